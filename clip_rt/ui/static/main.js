// The page: its views by their address, its model, its colours.

import { $, $$, showError } from "./dom.js";
import { ask, Gone, server, watchServer } from "./api.js";
import { fillModels } from "./options.js";
import { startSearch } from "./search.js";
import { startThresholds } from "./thresholds.js";
import { startWork } from "./work.js";

const SECTIONS = {
  classify: "#view-work",
  compare: "#view-work",
  search: "#view-search",
  thresholds: "#view-thresholds",
};
let views = null;

const findName = () => {
  const name = location.hash.slice(1);
  return name in SECTIONS ? name : "classify";
};

function route() {
  if (location.hash && !(location.hash.slice(1) in SECTIONS)) {
    // The link that skips to the view.
    return;
  }
  const name = findName();
  for (const link of $$("nav a")) {
    const isHere = link.hash === `#${name}`;
    isHere ? link.setAttribute("aria-current", "page") : link.removeAttribute("aria-current");
    if (isHere) {
      document.title = `${link.textContent} – clip_rt`;
    }
  }
  for (const section of $$(".view")) {
    section.hidden = `#${section.id}` !== SECTIONS[name];
  }
  $("#classify-results").hidden = name !== "classify";
  $("#compare-results").hidden = name !== "compare";
  $("#model").disabled = name === "compare" || $("#model").length < 2;
  views?.[name]();
}

function setUpTheme() {
  const button = $("#theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const root = document.documentElement;
  const show = () => {
    const isDark = root.dataset.theme ? root.dataset.theme === "dark" : system.matches;
    button.setAttribute("aria-pressed", String(isDark));
    return isDark;
  };
  button.addEventListener("click", () => {
    root.dataset.theme = show() ? "light" : "dark";
    try {
      localStorage.setItem("theme", root.dataset.theme);
    } catch {
      // Storage is switched off: it is for this time only.
    }
    show();
  });
  system.addEventListener("change", show);
  show();
}

async function start() {
  let settings;
  try {
    settings = await ask("/ui/settings");
  } catch (error) {
    if (error instanceof Gone) {
      server.addEventListener("back", start, { once: true });
    } else {
      $$(".results").forEach((results) => showError(results, error.message));
    }
    return;
  }
  const model = $("#model");
  fillModels(model, settings);
  const context = {
    settings,
    get model() {
      return model.value;
    },
  };
  const work = startWork(context);
  const search = startSearch(context);
  const thresholds = startThresholds(context);
  views = {
    classify: () => work.show("classify"),
    compare: () => work.show("compare"),
    search: search.show,
    thresholds: thresholds.show,
  };
  model.addEventListener("change", () => {
    ({ classify: work, search, thresholds })[findName()]?.refresh();
  });
  route();
}

addEventListener("hashchange", route);
// What is dropped beside a view must not take its place.
for (const kind of ["dragover", "drop"]) {
  addEventListener(kind, (event) => event.preventDefault());
}
// Nor may a form be sent as the browser sends it: it would load the page anew, without what was typed.
addEventListener("submit", (event) => {
  if (event.target.method !== "dialog") {
    event.preventDefault();
  }
});
setUpTheme();
route();
watchServer();
start();
