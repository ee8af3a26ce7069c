"use strict";
// The pictures, with what counts from the least score on.
const slider = byId("slider"), kind = byId("kind"), chosen = byId("class-filter");
slider.value = data.threshold;
const inPictures = new Set(data.pictures.flatMap((p) => [...p.truth, ...p.found].map((box) => box[4])));
data.classes.forEach((name, k) => {
  if (inPictures.has(k)) chosen.add(new Option(name, k));
});

function drawn(picture, box, what, text) {
  const element = document.createElement("div");
  element.className = "box " + what;
  const place = { left: box[0] / picture.width, top: box[1] / picture.height, width: box[2] / picture.width, height: box[3] / picture.height };
  for (const [side, share] of Object.entries(place)) element.style[side] = 100 * share + "%";
  if (text) {
    const label = document.createElement("span");
    label.textContent = text;
    element.append(label);
  }
  return element;
}

function figure(picture, least, only) {
  const shown = (box) => only === "" || box[4] === Number(only);
  const boxes = [];
  const count = { found: 0, missed: 0, wrong: 0 };
  for (const box of picture.truth.filter(shown)) {
    const state = box[5] === -2 ? "ignored" : box[5] >= least && box[5] >= 0 ? "found" : "missed";
    count[state] += 1;
    const what = { ignored: "ignored", found: "truth", missed: "missed" }[state];
    boxes.push(drawn(picture, box, what, state === "found" ? "" : data.classes[box[4]] + (state === "ignored" ? " (crowd)" : "")));
  }
  const detections = picture.found.filter((box) => shown(box) && box[5] >= least);
  for (const box of detections.reverse()) {
    const what = box[6] === 1 ? "right" : box[6] === 0 ? "wrong" : "ignored";
    if (what === "wrong") count.wrong += 1;
    boxes.push(drawn(picture, box, what, data.classes[box[4]] + " " + box[5].toFixed(2)));
  }
  const result = document.createElement("figure");
  const frame = document.createElement("div");
  frame.className = "frame";
  frame.style.aspectRatio = picture.width + " / " + picture.height;
  frame.style.maxWidth = 380 * (picture.width / picture.height) + "px"; // so that upright ones are no higher than this
  if (picture.src) {
    const image = new Image();
    image.src = picture.src;
    image.alt = picture.name;
    frame.append(image);
  }
  frame.append(...boxes);
  const caption = document.createElement("figcaption");
  caption.textContent = `${picture.name}: ${count.found} of ${count.found + count.missed} found, ${count.wrong} wrong`;
  result.append(frame, caption);
  return [result, count];
}

function showPictures() {
  const least = Number(slider.value), only = chosen.value;
  byId("least").textContent = least.toFixed(2);
  const has = (p) =>
    only === "" || p.truth.some((box) => box[4] === Number(only)) || p.found.some((box) => box[4] === Number(only) && box[5] >= least);
  const pictures = data.pictures.filter((p) => (kind.value === "" || p.kinds.includes(kind.value)) && has(p));
  const figures = pictures.map((p) => figure(p, least, only));
  const sum = (state) => figures.reduce((total, [, count]) => total + count[state], 0);
  byId("tally").textContent =
    `${pictures.length} pictures: ${sum("found")} of ${sum("found") + sum("missed")} boxes found, ${sum("wrong")} wrong detections`;
  byId("pictures").replaceChildren(...figures.map(([element]) => element));
}
for (const control of [slider, kind, chosen]) control.addEventListener("input", showPictures);
showPictures();
