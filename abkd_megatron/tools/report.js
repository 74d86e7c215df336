"use strict";
// What is under the pointer, or at the step that the arrow keys have come to: on a line below each chart.
const charts = JSON.parse(document.getElementById("charts").textContent);
document.querySelectorAll("figure").forEach((figure, index) => {
  const { x, y, log, series, box } = charts[index];
  const [svg, output] = [figure.querySelector("svg"), figure.querySelector("output")];
  const [pointer, rest] = [svg.querySelector(".pointer"), output.textContent];
  const steps = [...new Set(series.flatMap((one) => [...one.line, ...one.dots].map(([step]) => step)))].sort((a, b) => a - b);
  const across = (step) => box[0] + ((step - x[0]) / (x[1] - x[0])) * (box[2] - box[0]);
  const scale = (value) => (log ? Math.log10(value) : value);
  const up = (value) => box[1] + ((scale(y[1]) - scale(value)) / (scale(y[1]) - scale(y[0]))) * (box[3] - box[1]);
  const place = (points, wanted) => {  // the first that is not before it
    let [low, high] = [0, points.length];
    while (low < high) {
      const middle = (low + high) >> 1;
      if (points[middle] < wanted) low = middle + 1;
      else high = middle;
    }
    return low;
  };
  const nearest = (points, wanted) => {
    const at = place(points, wanted);
    return at > 0 && (at === points.length || wanted - points[at - 1] <= points[at] - wanted) ? at - 1 : at;
  };
  const text = (value) => {
    if (Math.abs(value) >= 1e4 || Number.isInteger(value)) return value.toFixed(0).replace(/\B(?=(\d{3})+$)/g, "\u202f");
    const short = Number(value.toPrecision(5));
    return Math.abs(short) < 1e-4 ? short.toExponential() : String(short);
  };
  const draw = (name, attributes) => {
    const mark = document.createElementNS("http://www.w3.org/2000/svg", name);
    Object.entries(attributes).forEach(([key, value]) => mark.setAttribute(key, value));
    pointer.append(mark);
  };
  let current = -1;
  const show = (at) => {
    current = Math.max(0, Math.min(steps.length - 1, at));
    const step = steps[current];
    const said = [];
    pointer.replaceChildren();
    draw("path", { class: "at", d: `M${across(step)} ${box[1]}V${box[3]}` });
    for (const { label, color, line, dots } of series) {
      const found = [];
      for (const [points, name, reach] of [[line, label, (x[1] - x[0]) / 60], [dots, "validation", 0]]) {
        if (!points.length) continue;
        const [its, value] = points[nearest(points.map((point) => point[0]), step)];
        if (Math.abs(its - step) > reach) continue;
        draw("circle", { class: `dot k${color}`, r: 4, cx: across(its), cy: up(value) });
        const what = found.length || points === line ? name : `${label}, ${name}`;
        found.push(`${what} ${text(value)}${its === step ? "" : ` (step ${its})`}`);
      }
      if (found.length) said.push(found.join(", "));
    }
    output.textContent = `step ${step}: ${said.join("; ")}`;
  };
  const leave = () => {
    current = -1;
    pointer.replaceChildren();
    output.textContent = rest;
  };
  const point = (event) => {
    const area = svg.getBoundingClientRect();
    const place = ((event.clientX - area.left) / area.width) * svg.viewBox.baseVal.width;
    show(nearest(steps, x[0] + ((place - box[0]) / (box[2] - box[0])) * (x[1] - x[0])));
  };
  svg.addEventListener("pointermove", point);
  svg.addEventListener("pointerdown", point);
  svg.addEventListener("pointerleave", leave);
  svg.addEventListener("blur", leave);
  svg.addEventListener("keydown", (event) => {
    const from = current < 0 ? steps.length - 1 : current;
    const to = { ArrowLeft: from - 1, ArrowRight: from + 1, Home: 0, End: steps.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    show(to);
  });
});
