// Numbers as words, tokens as elements, bars. It knows no data.
function number(value, digits = 3) {
  if (!Number.isFinite(value)) return "n/a";
  const size = Math.abs(value);
  const text = value === 0 ? "0" : size >= 10 ** digits ? Math.round(value).toLocaleString("en")
    : size < 1e-4 ? value.toExponential(digits - 1) : value.toPrecision(digits);
  return text.replaceAll("-", "−");
}
const percent = (share) => `${number(100 * share)}%`;
const signed = (value, digits) => (value > 0 ? "+" : "") + number(value, digits);
const counted = (count, noun) => `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;

function token(text) {
  const word = make("bdi", { class: "token" });
  for (const part of text.split(/([\n\t]|^ +| +$)/)) {
    const kind = { "\n": "nl", "\t": "tab", " ": "sp" }[part[0]];
    if (kind && part.trim() === "") word.append(make("i", { class: kind }, part));
    else if (part) word.append(part);
  }
  if (!text) word.append(make("i", { class: "none" }, "empty"));
  return word;
}

// Round values from 0 to the largest, 1, 2 or 5 times a power of ten apart.
function rounds(largest) {
  const power = 10 ** Math.floor(Math.log10(largest / 4)), step = [1, 2, 5, 10].find((times) => 5.5 * times * power >= largest) * power;
  return Array.from({ length: Math.floor(largest / step) + 1 }, (_, index) => index * step);
}
// Bars on a logarithmic axis of counts; one tab stop, arrow keys walk.
function bars(counts, tell, ticks, title, sizes = [560, 170]) {
  const [width, height] = sizes, left = 44, bottom = height - 36, top = 8, room = width - left - 4;
  const decades = Math.max(1, Math.ceil(Math.log10(Math.max(...counts, 2)))), wide = room / counts.length;
  const y = (count) => bottom - (bottom - top) * (Math.log10(count) + .25) / (decades + .25);
  const svg = make("svg:svg", { viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": title });
  for (let decade = 0, step = Math.ceil(decades / 4); decade <= decades; decade += step) {
    const at = y(10 ** decade);
    svg.append(make("svg:line", { class: "grid", x1: left, x2: width - 4, y1: at, y2: at }),
      make("svg:text", { class: "tick", x: left - 6, y: at + 4, "text-anchor": "end" }, (10 ** decade).toLocaleString("en")));
  }
  svg.append(make("svg:line", { class: "base", x1: left, x2: width - 4, y1: bottom, y2: bottom }));
  for (const [share, text] of ticks) {
    const anchor = share === 0 ? "start" : share > .97 ? "end" : "middle";
    svg.append(make("svg:text", { class: "tick", x: left + share * room, y: bottom + 15, "text-anchor": anchor }, text));
  }
  svg.append(make("svg:text", { class: "axis", x: left + room / 2, y: height - 3, "text-anchor": "middle" }, title));
  const marks = [];
  counts.forEach((count, index) => {
    if (!count) return;
    const text = tell(index, count), at = y(count);
    const mark = make("svg:g", { class: "mark", role: "img", "aria-label": text },
      make("svg:rect", { class: "hit", x: left + index * wide, y: top, width: wide, height: bottom - top }),
      make("svg:rect", { class: "bar", x: left + index * wide + .5, y: at, width: Math.max(wide - 1, 1), height: bottom - at }));
    marks.push(mark);
    svg.append(mark);
  });
  walkable(svg, marks, (at) => showTip(marks[at]), { keys: { ArrowUp: (at) => at + 1, ArrowDown: (at) => at - 1 } });
  return svg;
}
