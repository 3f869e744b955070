// Boxes are drawn with the pointer, and kept in `props.value` as parts of the picture's width and height.
const SMALLEST = 0.005; // a click without a movement draws nothing
let start = null;

const find = (selector) => element.querySelector(selector);

function place(event) {
  const frame = find("svg").getBoundingClientRect();
  const inside = (value) => Math.min(Math.max(value, 0), 1);
  return [inside((event.clientX - frame.left) / frame.width), inside((event.clientY - frame.top) / frame.height)];
}

function drawn(event) {
  const end = place(event);
  return [0, 1].map((axis) => Math.min(start[axis], end[axis])).concat([0, 1].map((axis) => Math.max(start[axis], end[axis])));
}

function sketch([left, top, right, bottom]) {
  const sides = { x: left, y: top, width: right - left, height: bottom - top };
  Object.entries(sides).forEach(([name, value]) => find(".sam3-draft").setAttribute(name, value));
}

element.addEventListener("pointerdown", (event) => {
  if (event.button !== 0 || !props.picture || !event.target.closest("svg")) return;
  event.preventDefault();
  find("svg").setPointerCapture(event.pointerId);
  start = place(event);
});

element.addEventListener("pointermove", (event) => {
  if (start) sketch(drawn(event));
});

element.addEventListener("pointerup", (event) => {
  if (!start) return;
  const box = drawn(event);
  start = null;
  sketch([0, 0, 0, 0]);
  if (box[2] - box[0] < SMALLEST || box[3] - box[1] < SMALLEST) return;
  props.value = [...(props.value || []), { box, positive: props.positive }];
});

element.addEventListener("pointercancel", () => {
  start = null;
  sketch([0, 0, 0, 0]);
});

const actions = {
  example: () => (props.positive = true),
  other: () => (props.positive = false),
  undo: () => (props.value = (props.value || []).slice(0, -1)),
  clear: () => (props.value = []),
};

element.addEventListener("click", (event) => {
  const button = event.target.closest("[data-do]");
  if (button) actions[button.dataset.do]();
});
