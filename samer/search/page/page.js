// The search page: asks /api/search while one types, and draws what each word of the query looked at.
"use strict";

const PAUSE = 300; // milliseconds without typing before a search
const EVIDENCE = "#e69f00";
const BOX = "#56b4e9";
const HALO = "rgba(0, 0, 0, 0.75)";
const DIM = "rgba(10, 12, 14, 0.68)";
const STATES = {
  gone: "Its file is gone; scripts/index.py --sync takes it out of the index.",
  changed: "Its file changed since it was indexed; run scripts/index.py again.",
};

const at = (id) => document.getElementById(id);
const state = {
  indexes: [], // from the smallest to the largest
  place: 0, // in indexes
  answer: null, // the latest response
  pinned: null, // number of the word that was clicked or tapped
  hovered: null,
  focused: null,
  request: null, // AbortController of the search under way
  timer: null,
};

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

const counted = (value, digits = 0) =>
  value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });

function size(bytes) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  while (bytes >= 999.5 && unit < units.length - 1) {
    bytes /= 1000;
    unit += 1;
  }
  return `${counted(bytes, unit > 0 && bytes < 99.5 ? 1 : 0)} ${units[unit]}`;
}

const milliseconds = (value) => `${counted(value, value < 10 ? 1 : 0)} ms`;

async function fetched(address, signal) {
  let response;
  try {
    response = await fetch(address, { signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer; is it still running?");
  }
  const body = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error(body.error || `The server answered with status ${response.status}.`);
  return body;
}

function say(words, failed = false) {
  at("status").textContent = words;
  at("status").classList.toggle("error", failed);
}

// --- the index -------------------------------------------------------------------------------------------------------

function showChoice() {
  const slider = at("slider");
  const last = state.indexes.length - 1;
  at("choice").hidden = last < 1;
  slider.max = Math.max(last, 0);
  at("ticks").replaceChildren(
    ...state.indexes.map((index, place) => {
      const tick = element("span", { title: index.name }, element("b", { textContent: index.name }), size(index.bytes_per_image));
      tick.style.setProperty("--at", last ? place / last : 0);
      tick.addEventListener("click", () => move(place));
      return tick;
    }),
  );
  showPlace();
}

function showPlace() {
  const index = state.indexes[state.place];
  const slider = at("slider");
  slider.value = state.place;
  slider.setAttribute("aria-valuetext", `${index.name}, ${size(index.bytes_per_image)} per image`);
  [...at("ticks").children].forEach((tick, place) => tick.classList.toggle("now", place === state.place));
  const current = state.answer && state.answer.index.index === index.index ? state.answer : null;
  const perImage = size(index.bytes_per_image);
  const exact = index.exact_bytes_per_image;
  const facts = [
    ["Index", index.name],
    ["Compressor", index.compressor],
    ["Vectors", `${counted(index.regions)}, ${index.dtype}`],
    ["Per image", exact ? `${perImage}, and ${size(exact)} to re-rank` : perImage],
    ["In all", `${size(index.total_bytes)} for ${counted(index.images)} images`],
    ["Encode", current ? milliseconds(current.encode_ms) : "–"],
    ["Search", current ? milliseconds(current.search_ms) : "–"],
  ];
  at("facts").replaceChildren(
    ...facts.map(([name, value]) => element("div", {}, element("dt", { textContent: name }), element("dd", { textContent: value }))),
  );
}

function move(place) {
  if (place === state.place) return;
  state.place = place;
  showPlace();
  search();
}

// --- searching -------------------------------------------------------------------------------------------------------

function remember(text) {
  const asked = new URLSearchParams();
  if (text) asked.set("q", text);
  if (state.indexes.length > 1) asked.set("index", state.indexes[state.place].index);
  const query = asked.toString();
  history.replaceState(null, "", query ? `?${query}` : location.pathname);
}

async function search() {
  clearTimeout(state.timer);
  if (state.request) state.request.abort(); // an answer that comes late must not replace a newer one
  const text = at("query").value.trim();
  remember(text);
  if (!text) {
    state.request = null;
    at("results").removeAttribute("aria-busy");
    show(null);
    say(welcome());
    return;
  }
  const request = new AbortController();
  state.request = request;
  at("results").setAttribute("aria-busy", "true");
  try {
    const asked = new URLSearchParams({ index: state.indexes[state.place].index, q: text, top: 12 });
    const answer = await fetched(`/api/search?${asked}`, request.signal);
    if (state.request !== request) return;
    state.indexes[state.place] = answer.index; // it may have grown
    show(answer);
    const shown = answer.results.length;
    say(shown ? `The best ${shown} of ${counted(answer.index.images)} pictures` : "This index holds no pictures.");
  } catch (error) {
    if (state.request !== request || error.name === "AbortError") return;
    show(null);
    say(error.message, true);
  } finally {
    if (state.request === request) at("results").removeAttribute("aria-busy");
  }
}

function welcome() {
  const index = state.indexes[state.place];
  return `Write what to look for among ${counted(index.images)} pictures.`;
}

function show(answer) {
  const sameQuery = answer && state.answer && answer.query === state.answer.query;
  if (!sameQuery) {
    state.pinned = state.hovered = state.focused = null;
    showWords(answer ? answer.words : []);
  }
  state.answer = answer;
  const results = answer ? answer.results : [];
  at("results").replaceChildren(...results.map((result, place) => card(result, place, answer.index)));
  showPlace();
  showEvidence();
}

function card(result, place, index) {
  const frame = element("div", { className: "frame" });
  const missing = (words) => frame.replaceChildren(element("p", { textContent: words }));
  if (index.pictures) {
    const image = element("img", { alt: `Result ${place + 1}: ${result.id}`, decoding: "async" });
    image.addEventListener("load", showEvidence);
    image.addEventListener("error", () => missing("The picture can’t be read; is it still in its folder?"));
    image.src = result.image;
    frame.append(image, element("canvas", { ariaHidden: "true" }));
  } else {
    missing("This index does not know where its pictures lie; start the server with --data-root.");
  }
  const name = element("span", { className: "name", textContent: result.id.split("/").pop(), title: result.id });
  const about = element(
    "p",
    { className: "about" },
    element("span", { className: "rank", textContent: place + 1 }),
    name,
    ...(result.state ? [element("span", { className: "state", textContent: result.state, title: STATES[result.state] })] : []),
    element("span", { className: "score", textContent: result.score.toFixed(4), title: "Score" }),
  );
  return element("li", {}, frame, about, element("p", { className: "evidence" }));
}

// --- the words of the query, and what they looked at --------------------------------------------------------------------

function showWords(words) {
  const buttons = words.map((word, number) => {
    const button = element("button", { type: "button", textContent: word.text, ariaPressed: "false" });
    const note = (key, value) => {
      state[key] = value;
      showEvidence();
    };
    button.addEventListener("pointerenter", (event) => event.pointerType === "mouse" && note("hovered", number));
    button.addEventListener("pointerleave", () => note("hovered", null));
    button.addEventListener("focus", () => note("focused", button.matches(":focus-visible") ? number : null));
    button.addEventListener("blur", () => note("focused", null));
    button.addEventListener("click", () => note("pinned", state.pinned === number ? null : number));
    button.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (event.key === "Escape") note("pinned", null);
      if (!step) return;
      event.preventDefault();
      buttons[(number + step + buttons.length) % buttons.length].focus();
    });
    return button;
  });
  at("words").replaceChildren(...buttons);
}

const activeWord = () => state.hovered ?? state.focused ?? state.pinned;

function showEvidence() {
  const answer = state.answer;
  const active = answer ? activeWord() : null;
  [...at("words").children].forEach((button, number) => {
    button.classList.toggle("active", number === active);
    button.ariaPressed = String(number === state.pinned);
  });
  showHint(active);
  if (!answer) return;
  [...at("results").children].forEach((item, place) => {
    const result = answer.results[place];
    const image = item.querySelector("img");
    const canvas = item.querySelector("canvas");
    const told = active === null ? null : result.words[active];
    item.querySelector(".evidence").textContent = told ? inWords(answer, result, told, active) : "";
    if (!canvas) return;
    const drawn = Boolean(told && result.regions && image.complete && image.naturalWidth);
    if (drawn) draw(canvas, image, result, told);
    canvas.classList.toggle("shown", drawn);
  });
}

function showHint(active) {
  const hint = at("hint");
  const index = state.answer ? state.answer.index : null;
  if (!index) {
    hint.replaceChildren();
  } else if (!index.evidence) {
    hint.textContent = "This index keeps no regions, so what a word matched can’t be drawn; build it anew without --no-assignments.";
  } else if (active === null) {
    hint.textContent = "Point at, tap or tab to a word to see what it matched in each picture.";
  } else {
    const word = state.answer.words[active].text;
    hint.replaceChildren(element("span", { className: "key" }), `region that ‘${word}’ matched`);
    if (index.boxes) hint.append(element("span", { className: "key box" }), "annotated boxes");
  }
}

function inWords(answer, result, told, active) {
  const word = answer.words[active].text.replace(/^[^\p{L}\p{N}]+|[^\p{L}\p{N}]+$/gu, "") || answer.words[active].text;
  if (!told.vectors.length) return `The model reads nothing in ‘${word}’`;
  if (!result.regions) return "";
  const chosen = new Set(told.vectors);
  if (told.box_mass !== null) return `${Math.round(100 * told.box_mass)} % inside the boxes of ‘${word}’`;
  if (!result.regions.some((vector) => chosen.has(vector))) return `‘${word}’ matched a vector without patches`;
  return answer.index.boxes ? `no box of ‘${word}’ in this picture` : "";
}

function draw(canvas, image, { regions, grid: [rows, columns] }, told) {
  // the picture lies in the middle of its frame, as large as fits
  const frame = image.parentElement;
  const scale = Math.min(frame.clientWidth / image.naturalWidth, frame.clientHeight / image.naturalHeight);
  const shown = [image.naturalWidth * scale, image.naturalHeight * scale];
  const density = window.devicePixelRatio || 1;
  [canvas.width, canvas.height] = shown.map((length) => Math.round(length * density));
  [canvas.style.width, canvas.style.height] = shown.map((length) => `${length}px`);
  const { width, height } = canvas;
  const pen = canvas.getContext("2d");
  const chosen = new Set(told.vectors);
  const lit = (row, column) =>
    row >= 0 && column >= 0 && row < rows && column < columns && chosen.has(regions[row * columns + column]);
  const x = (column) => Math.round((column * width) / columns);
  const y = (row) => Math.round((row * height) / rows);
  pen.fillStyle = DIM;
  pen.fillRect(0, 0, width, height);
  const edges = new Path2D();
  for (let row = 0; row < rows; row += 1) {
    for (let column = 0; column < columns; column += 1) {
      if (!lit(row, column)) continue;
      const [left, top, right, bottom] = [x(column), y(row), x(column + 1), y(row + 1)];
      pen.clearRect(left, top, right - left, bottom - top);
      const edge = (besides, x1, y1, x2, y2) => {
        if (besides) return;
        edges.moveTo(x1, y1);
        edges.lineTo(x2, y2);
      };
      edge(lit(row - 1, column), left, top, right, top);
      edge(lit(row + 1, column), left, bottom, right, bottom);
      edge(lit(row, column - 1), left, top, left, bottom);
      edge(lit(row, column + 1), right, top, right, bottom);
    }
  }
  pen.lineCap = "square";
  pen.strokeStyle = EVIDENCE;
  pen.lineWidth = 1.5 * density;
  pen.stroke(edges);
  for (const [x1, y1, x2, y2] of told.boxes || []) {
    const rectangle = [x1 * width, y1 * height, (x2 - x1) * width, (y2 - y1) * height];
    for (const [colour, thickness] of [[HALO, 4.5], [BOX, 2]]) {
      pen.strokeStyle = colour;
      pen.lineWidth = thickness * density;
      pen.strokeRect(...rectangle);
    }
  }
}

// --- start -----------------------------------------------------------------------------------------------------------

async function start() {
  const asked = new URLSearchParams(location.search);
  at("query").value = asked.get("q") || ""; // at once: what is typed while the list of indexes comes stays
  try {
    const { indexes } = await fetched("/api/indexes");
    state.indexes = indexes.sort((a, b) => a.bytes_per_image - b.bytes_per_image || a.index - b.index);
  } catch (error) {
    say(error.message, true);
    return;
  }
  state.place = Math.max(0, state.indexes.findIndex((index) => String(index.index) === asked.get("index")));
  showChoice();
  at("form").addEventListener("submit", (event) => {
    event.preventDefault();
    search();
  });
  at("query").addEventListener("input", () => {
    clearTimeout(state.timer);
    state.timer = setTimeout(search, PAUSE);
  });
  at("slider").addEventListener("input", () => move(Number(at("slider").value)));
  window.addEventListener("resize", showEvidence);
  search();
}

start();
