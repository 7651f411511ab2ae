// Elements, numbers and messages: what every view writes with. Text is always set as text.

export const $ = (selector, within = document) => within.querySelector(selector);
export const $$ = (selector, within = document) => [...within.querySelectorAll(selector)];

/** Return an element with properties and children; strings become text. */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in element) {
      element[name] = value;
    } else {
      element.setAttribute(name, value);
    }
  }
  element.append(...children);
  return element;
}

/** Return an element of SVG with attributes. */
export function makeSvg(tag, attributes = {}) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) {
    element.setAttribute(name, value);
  }
  return element;
}

export const percent = (share) => `${(100 * share).toFixed(1)} %`;
export const plural = (number, word) =>
  `${number.toLocaleString("en")} ${word}${number === 1 ? "" : "s"}`;

/** Return a function that runs another once nobody has called it for so long. */
export function debounce(run, wait_ms) {
  let timer;
  return (...given) => {
    clearTimeout(timer);
    timer = setTimeout(() => run(...given), wait_ms);
  };
}

let toastTimer;

/** Say something for a moment. */
export function say(text) {
  $("#toast").replaceChildren(make("p", {}, text));
  clearTimeout(toastTimer);
  toastTimer = setTimeout(() => $("#toast").replaceChildren(), 3000);
}

/** Show an error in the place that a view has for it; none without a message. */
export function showError(results, message = "") {
  const place = $(".error", results);
  place.textContent = message;
  place.hidden = !message;
}

/** Return the lines of a text that say something. */
export const linesOf = (text) => text.split("\n").map((line) => line.trim()).filter(Boolean);

/** Return a picture's place with its image in it. */
export function makeThumb(url, name) {
  const thumb = make("div", { className: "thumb" });
  if (url) {
    thumb.append(make("img", { src: url, alt: name, loading: "lazy", decoding: "async" }));
  }
  return thumb;
}

/** Return ranked labels as bars, the best first. */
export function makeBars(labels) {
  return make(
    "ol",
    { className: "bars" },
    ...labels.map(({ label, probability, similarity }) => {
      const item = make(
        "li",
        { className: similarity === null ? "none" : "" },
        make("span", { title: label }, label),
        make("span", {}, percent(probability)),
      );
      if (similarity !== null) {
        item.title = `${label}: similarity ${similarity.toFixed(4)}`;
      }
      item.style.setProperty("--share", `${100 * probability}%`);
      return item;
    }),
  );
}
