"use strict";
const byId = (id) => document.getElementById(id);
const data = JSON.parse(byId("data").textContent);
const slider = byId("slider"), chosen = byId("class-filter"), dialog = byId("attention");
const AT_ONE_TIME = 4; // uploads; the server gathers them into batches
const TRIES = 120; // a second each, while the server has enough in hand
const pictures = []; // { file, address, answer, problem, figure }
const unsent = [];
let running = 0;
slider.value = data.threshold;

// The server's answer to a file, or an Error that says in a sentence what is wrong.
async function ask(path, file) {
  for (let tried = 1; ; tried++) {
    let response;
    try {
      response = await fetch(path, { method: "POST", body: file });
    } catch {
      throw new Error("The server does not answer, or the file cannot be read any more.");
    }
    if (response.ok) return response.json();
    const refusal = await response.json().catch(() => ({ error: `The server answers with status ${response.status}.` }));
    if (response.status !== 503 || tried === TRIES) throw new Error(refusal.error);
    await new Promise((wake) => setTimeout(wake, 1000)); // Retry-After
  }
}

function add(files) {
  for (const file of files) {
    const picture = { file, address: URL.createObjectURL(file), figure: document.createElement("figure") };
    pictures.push(picture);
    unsent.push(picture);
    byId("pictures").append(picture.figure);
  }
  send();
  show();
}

function send() {
  while (running < AT_ONE_TIME && unsent.length) {
    const picture = unsent.shift();
    running += 1;
    ask("detect", picture.file)
      .then((answer) => (picture.answer = answer), (error) => (picture.problem = error.message))
      .finally(() => {
        running -= 1;
        send();
        show();
      });
  }
}

// What is shown of a picture at the slider's and the filter's values, best score first, as the server tells it.
function chosenOf(picture) {
  const least = Number(slider.value), only = chosen.value;
  const found = picture.answer ? picture.answer.detections : [];
  return found.filter((one) => one.score >= least && (only === "" || one.name === only));
}

function boxOf(picture, one) {
  const { width, height } = picture.answer;
  const [left, top, right, bottom] = one.box.map((edge, k) => Math.min(Math.max(edge / (k % 2 ? height : width), 0), 1));
  const element = document.createElement("button");
  element.className = "box";
  const place = { left, top, width: right - left, height: bottom - top };
  for (const [side, share] of Object.entries(place)) element.style[side] = 100 * share + "%";
  const color = data.colors[one.label];
  const [red, green, blue] = [1, 3, 5].map((k) => parseInt(color.slice(k, k + 2), 16));
  element.style.setProperty("--class", color);
  element.style.setProperty("--on-class", 0.299 * red + 0.587 * green + 0.114 * blue > 120 ? "black" : "white");
  const label = document.createElement("span");
  label.textContent = `${one.name} ${one.score.toFixed(2)}`;
  if (left > 0.7) Object.assign(label.style, { left: "auto", right: "-2px" }); // else it would leave the picture
  element.append(label);
  element.addEventListener("click", () => showAttention(picture, one));
  return element;
}

// Browsers turn pictures by their EXIF orientation, as the server does, but not WebP: here it is done for them.
const TURNS = { 2: "scaleX(-1)", 3: "rotate(180deg)", 4: "scaleY(-1)", 5: "rotate(90deg) scaleY(-1)", 6: "rotate(90deg)", 7: "rotate(-90deg) scaleY(-1)", 8: "rotate(-90deg)" };
function turn(image, { width, height, orientation }) {
  const [across, down] = orientation >= 5 ? [height / width, width / height] : [1, 1];
  Object.assign(image.style, {
    imageOrientation: "none", position: "absolute", left: "50%", top: "50%",
    width: 100 * across + "%", height: 100 * down + "%", transform: `translate(-50%, -50%) ${TURNS[orientation]}`,
  });
}

function draw(picture) {
  const { answer, problem, file, figure } = picture;
  const frame = document.createElement("div");
  frame.className = answer ? "frame" : problem ? "frame plain" : "frame plain busy";
  picture.image ??= Object.assign(new Image(), { src: picture.address, alt: file.name });
  frame.append(picture.image);
  const shown = chosenOf(picture);
  if (answer) {
    frame.style.aspectRatio = `${answer.width} / ${answer.height}`;
    frame.style.maxWidth = 520 * (answer.width / answer.height) + "px"; // so that upright ones are no higher than this
    if (answer.orientation in TURNS && file.type === "image/webp") turn(picture.image, answer);
    const area = ({ box }) => (box[2] - box[0]) * (box[3] - box[1]);
    const order = [...shown].sort((a, b) => area(b) - area(a)); // small ones above, where they can be touched
    frame.append(...order.map((one) => boxOf(picture, one)));
  }
  const caption = document.createElement("figcaption");
  caption.className = problem ? "failed" : "";
  const state = problem ?? (answer ? `${shown.length} of ${answer.detections.length} detections` : "looking …");
  caption.textContent = `${file.name}: ${state}`;
  figure.replaceChildren(frame, caption);
  return shown.length;
}

function show() {
  byId("least").textContent = Number(slider.value).toFixed(2);
  const least = Number(slider.value), before = chosen.value;
  const names = pictures.flatMap((p) => (p.answer ? p.answer.detections : []).filter((one) => one.score >= least).map((one) => one.name));
  const options = [...new Set([...names, ...(before === "" ? [] : [before])])].sort((a, b) => a.localeCompare(b));
  chosen.replaceChildren(new Option("all classes", ""), ...options.map((name) => new Option(name, name, false, name === before)));
  const count = pictures.map(draw).reduce((sum, shown) => sum + shown, 0);
  const done = pictures.filter((picture) => picture.answer).length;
  byId("tally").textContent = pictures.length ? `${done} of ${pictures.length} pictures, ${count} objects` : "";
  byId("download").disabled = !done;
  byId("clear").disabled = !pictures.length;
  byId("hint").hidden = !count;
}

async function showAttention(picture, one) {
  const [title, state, large, small, note] = ["h2", ".state", ".panels.large", ".panels:not(.large)", ".note"].map((part) =>
    dialog.querySelector(part));
  title.textContent = `Where the query of ${one.name} ${one.score.toFixed(2)} looked`;
  state.textContent = "looking again …";
  state.classList.remove("failed");
  for (const part of [large, small, note]) part.replaceChildren();
  dialog.showModal();
  const mine = (dialog.asked = {}); // another box may be touched before the answer comes
  const which = new URLSearchParams({ box: one.box.join(","), label: one.label, score: one.score });
  try {
    const answer = await ask(`attention?${which}`, picture.file);
    if (dialog.asked !== mine) return;
    state.textContent = "";
    note.textContent = answer.note;
    for (const panel of answer.panels) {
      const figure = document.createElement("figure"), caption = document.createElement("figcaption"), image = new Image();
      caption.textContent = image.alt = panel.caption;
      image.src = panel.src;
      figure.append(caption, image);
      (panel.large ? large : small).append(figure);
    }
  } catch (error) {
    if (dialog.asked !== mine) return;
    state.textContent = error.message;
    state.classList.add("failed");
  }
}
dialog.addEventListener("click", (event) => event.target === dialog && dialog.close()); // beside it

// What is shown, in COCO's results format as `deperceiver predict` writes it.
function download() {
  const results = pictures.flatMap((picture, image_id) =>
    chosenOf(picture).map(({ box: [left, top, right, bottom], score, name, category_id }) => ({
      image_id, category_id, bbox: [left, top, right - left, bottom - top], score, file_name: picture.file.name, category_name: name,
    })));
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([JSON.stringify(results, null, 1)], { type: "application/json" }));
  link.download = "detections.json";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

function clear() {
  for (const picture of pictures.splice(0)) {
    URL.revokeObjectURL(picture.address);
    picture.figure.remove();
  }
  unsent.splice(0);
  show();
}

byId("files").addEventListener("change", (event) => {
  add(event.target.files);
  event.target.value = ""; // so that the same file can be chosen again
});
addEventListener("dragover", (event) => event.preventDefault());
for (const [name, over] of [["dragenter", true], ["dragleave", false], ["drop", false]]) {
  byId("drop").addEventListener(name, () => byId("drop").classList.toggle("over", over));
}
addEventListener("drop", (event) => {
  event.preventDefault();
  add([...event.dataTransfer.files]);
});
for (const control of [slider, chosen]) control.addEventListener("input", show);
byId("download").addEventListener("click", download);
byId("clear").addEventListener("click", clear);
show();
