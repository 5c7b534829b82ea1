// Mouse and keys of the viewer. The script runs as `onload` of a style element; `this` is that element.
const root = this.closest('.dx'), through = {axial: [1, 2, 0], coronal: [0, 2, 1], sagittal: [0, 1, 2]};
const keys = {
  ArrowUp: [0, -1], ArrowDown: [0, 1], ArrowLeft: [1, -1], ArrowRight: [1, 1], PageUp: [2, -1], PageDown: [2, 1],
};
const zooms = {'+': 1, '=': 1, '-': -1, '0': -100}, ends = {Home: 0, End: 1};
const said = {
  id: Math.random(), click: [0], over: null, by: [0, 0, 0], drag: [0, 0, 0], zoom: [0],
  pan: [0, 0, 0], ends: [0], size: 0,
};
let timer = null, held = null, last = null, turned = 0;
const send = () => timer ??= setTimeout(() => {
  timer = null;
  const box = root.querySelector('.dx-mouse input');
  if (!box) return;
  box.value = JSON.stringify(said);
  box.dispatchEvent(new Event('input', {bubbles: true}));
}, 30);
const pictures = () => [...root.querySelectorAll('img')].filter(i => i.offsetParent);
const measure = () => {
  const size = Math.round(Math.max(0, ...pictures().map(i => i.clientWidth)) * devicePixelRatio);
  if (size && Math.abs(size / said.size - 1) > 0.05) { said.size = size; send(); }
};
new ResizeObserver(measure).observe(root);
const plane = e => Object.keys(through).find(p => e.target.classList.contains('dx-' + p));
const place = e => [plane(e), e.offsetX / e.target.clientWidth, e.offsetY / e.target.clientHeight];
const on = (names, act) => names.split(' ').forEach(name => root.addEventListener(
  name, e => { if (plane(e)) { act(e); send(); } }, {passive: false},
));
const take = e => { e.preventDefault(); e.stopPropagation(); };
const click = e => said.click = [said.click[0] + 1, ...place(e)];
const zoom = (e, steps, at) => said.zoom = [Math.max(said.zoom[0], -99) + steps, ...at];
on('pointerdown', e => {
  take(e);
  e.target.tabIndex = 0;
  e.target.dataset.lmSuppressShortcuts = 'true';
  e.target.focus({preventScroll: true});
  e.target.setPointerCapture(e.pointerId);
  held = e.button == 1 || e.altKey || e.ctrlKey ? 'pan' : e.button == 2 || e.shiftKey ? 'window' : 'cross';
  last = e;
  if (held == 'cross') click(e);
});
on('pointermove', e => {
  said.over = place(e);
  if (!held || !last) return;
  const along = (e.clientX - last.clientX) / e.target.clientWidth;
  const up = (last.clientY - e.clientY) / e.target.clientHeight;
  if (held == 'cross') click(e);
  if (held == 'window') {
    said.drag = [said.drag[0] + along, said.drag[1] + up, +e.target.classList.contains('dx-second')];
  }
  if (held == 'pan') { said.pan[through[plane(e)][0]] -= up; said.pan[through[plane(e)][1]] += along; }
  last = e;
});
on('pointerup pointercancel', () => held = null);
on('pointerout', () => said.over = null);
on('contextmenu dragstart', take);
on('wheel', e => {
  take(e);
  turned += Math.max(-60, Math.min(60, e.deltaMode ? 60 * e.deltaY : e.deltaY));
  const steps = Math.trunc(turned / 60);
  turned -= 60 * steps;
  if (e.ctrlKey) { if (steps) zoom(e, -steps, place(e)); }
  else said.by[through[plane(e)][2]] += steps;
});
on('keydown', e => {
  if (e.key in keys) said.by[through[plane(e)][keys[e.key][0]]] += keys[e.key][1];
  else if (e.key in ends) said.ends = [said.ends[0] + 1, through[plane(e)][2], ends[e.key]];
  else if (e.key in zooms) zoom(e, zooms[e.key], said.over ?? [plane(e), 0.5, 0.5]);
  else return;
  take(e);
});
const save = () => {
  const rows = ['.dx-first', '.dx-second'].map(c => pictures().filter(i => i.matches(c))).filter(r => r.length);
  const side = rows[0][0].naturalWidth, line = Math.round(side / 18);
  const canvas = document.createElement('canvas'), pen = canvas.getContext('2d');
  canvas.width = side * rows[0].length;
  canvas.height = rows.length * (side + line) + line;
  pen.fillStyle = '#0b0d10';
  pen.fillRect(0, 0, canvas.width, canvas.height);
  pen.font = Math.round(0.6 * line) + 'px sans-serif';
  pen.fillStyle = '#c9d1d9';
  rows.forEach((row, r) => row.forEach((image, k) => {
    const title = image.closest('.dx-panel').querySelector('.dx-title').innerText;
    const words = title + '   ' + image.closest('.dx-one').innerText.trim();
    pen.fillText(words, k * side + 4, r * (side + line) + 0.75 * line, side - 8);
    pen.drawImage(image, k * side, r * (side + line) + line);
  }));
  pen.fillStyle = '#e3b341';
  pen.fillText(root.querySelector('.dx-caution').innerText.trim(), 4, canvas.height - 0.3 * line, canvas.width - 8);
  const link = document.createElement('a');
  link.href = canvas.toDataURL('image/png');
  link.download = 'diffx2ct.png';
  link.click();
};
root.addEventListener('click', e => {
  if (e.target.closest('.dx-save')) save();
  if (e.target.closest('.dx-full')) document.fullscreenElement ? document.exitFullscreen() : root.requestFullscreen();
});
