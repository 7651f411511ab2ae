// Thresholds: a labelled set, one label, and what a threshold of its similarity would do.
// Precision and recall come from the server, for every threshold that makes a difference; here
// they are only looked up.

import { $, debounce, make, makeSvg, makeThumb, percent, plural, say, showError } from "./dom.js";
import { ask, server } from "./api.js";
import { classify, takePictures } from "./pictures.js";
import { curl, python, pythonClient, pythonOptions, setUpCopies } from "./code.js";
import { setUpTemplates } from "./options.js";
import { Job } from "./job.js";

const NUM_BINS = 48;
const WIDTH = 800;
const HEIGHT = 260;
const NUM_STEPS = 1000;
const MAX_MISTAKES = 12;
const WAIT_MS = 250;

export function startThresholds(context) {
  const { settings } = context;
  const view = $("#view-thresholds");
  const results = $("#thresholds-results");
  const job = new Job(results);
  const slider = $("#threshold");
  const change = debounce(refresh, WAIT_MS);
  const readTemplates = setUpTemplates("threshold-", settings, change);
  let pictures = [];
  let chosen = null;
  let isOwnLabel = false;
  let found = null;

  const labelOf = (picture) => picture.folder || $("#loose-label").value.trim() || "other";
  const status = (text) => {
    $(".status", results).textContent = text;
  };

  function showClasses() {
    const counts = new Map();
    for (const picture of pictures) {
      counts.set(labelOf(picture), (counts.get(labelOf(picture)) ?? 0) + 1);
    }
    const names = [...counts.keys()].sort();
    if (!counts.has(chosen)) {
      choose(names[0] ?? null);
    }
    $("#classes").hidden = !names.length;
    $("#classes div").replaceChildren(
      ...names.map((name) => {
        const radio = make("input", {
          type: "radio",
          name: "class",
          value: name,
          checked: name === chosen,
        });
        radio.addEventListener("change", () => {
          choose(name);
          change();
        });
        return make("label", {}, radio, make("span", {}, name), make("span", {}, counts.get(name).toLocaleString("en")));
      }),
    );
    const note = $("#thresholds-count");
    note.hidden = !pictures.length;
    $("span", note).textContent = `${plural(pictures.length, "image")}, ${plural(names.length, "label")}`;
  }

  function choose(name) {
    chosen = name;
    if (!isOwnLabel) {
      $("#threshold-label").value = name === null ? "" : name.replaceAll(/[_-]+/g, " ");
    }
  }

  async function refresh() {
    const label = $("#threshold-label").value.trim();
    const empty = $(".empty", results);
    empty.hidden = pictures.length > 0;
    if (!pictures.length || !label) {
      job.stop();
      found = null;
      $(".tuning", results).hidden = true;
      status(pictures.length ? "Type the label." : "");
      return;
    }
    const request = { model: context.model, labels: [label], templates: readTemplates(), top_k: 1 };
    const key = JSON.stringify(request);
    const all = pictures;
    const todo = all.filter((each) => !each.answers.has(key));
    if (todo.length) {
      status(`Asking about ${plural(todo.length, "image")} …`);
    }
    const ending = await job.run(todo.length, async (signal, advance) => {
      await classify(todo, request, {
        settings,
        key,
        signal,
        onDone: (done) => advance(done.length),
      });
      const used = all
        .filter((each) => each.answers.get(key).labels)
        .map((picture) => ({
          picture,
          similarity: picture.answers.get(key).labels[0].similarity,
          fits: labelOf(picture) === chosen,
        }));
      const table = await ask(
        "/ui/thresholds",
        {
          similarities: used.map((each) => each.similarity),
          is_positive: used.map((each) => each.fits),
        },
        { signal },
      );
      const isNew = found?.request.labels[0] !== label || found?.chosen !== chosen;
      found = { request, used, table, chosen };
      draw(isNew);
      const numBad = all.length - used.length;
      status(
        `${plural(used.length, "image")}${numBad ? `, ${numBad} could not be used` : ""}; ` +
          `“${label}” fits ${used.filter((each) => each.fits).length}`,
      );
    });
    if (ending === "failed" || ending === "stopped") {
      found = null;
      $(".tuning", results).hidden = true;
      status("");
    }
  }

  function draw(isNew) {
    const { used, table } = found;
    const lowest = table.thresholds[0];
    const highest = table.thresholds.at(-1);
    const margin = 0.04 * (highest - lowest) || 0.01;
    found.low = lowest - margin;
    found.high = highest + margin;
    const step = (found.high - found.low) / NUM_STEPS;
    Object.assign(slider, { min: found.low, max: found.high, step });
    if (isNew) {
      slider.value = table.best_f1;
    }
    $("#scale-low").textContent = found.low.toFixed(3);
    $("#scale-high").textContent = found.high.toFixed(3);
    const counts = { true: new Array(NUM_BINS).fill(0), false: new Array(NUM_BINS).fill(0) };
    for (const { similarity, fits } of used) {
      const share = (similarity - found.low) / (found.high - found.low);
      counts[fits][Math.min(NUM_BINS - 1, Math.floor(share * NUM_BINS))] += 1;
    }
    // Each side by its own share, or a few images would not be seen beside many.
    const bars = [];
    for (const fits of [true, false]) {
      const most = Math.max(...counts[fits]);
      counts[fits].forEach((count, bin) => {
        const height = (count / most) * (HEIGHT / 2 - 6);
        const bar = makeSvg("rect", {
          x: (bin * WIDTH) / NUM_BINS + 1,
          width: WIDTH / NUM_BINS - 2,
          y: fits ? HEIGHT / 2 - height : HEIGHT / 2,
          height,
          class: fits ? "fits" : "others",
        });
        bar.dataset.high = found.low + ((bin + 1) / NUM_BINS) * (found.high - found.low);
        bars.push(bar);
      });
    }
    const axis = makeSvg("line", { x1: 0, x2: WIDTH, y1: HEIGHT / 2, y2: HEIGHT / 2 });
    const at = makeSvg("line", { class: "at", y1: 0, y2: HEIGHT });
    $("#histogram").replaceChildren($("#histogram-title"), ...bars, axis, at);
    const num = used.filter((each) => each.fits).length;
    $("#legend").replaceChildren(
      make("span", { className: "fits" }, `fits, ${plural(num, "image")}`),
      make("span", { className: "others" }, `others, ${plural(used.length - num, "image")}`),
    );
    $(".tuning", results).hidden = false;
    move();
  }

  /** Return the row of the table that holds at a threshold. */
  function findRow(threshold) {
    let low = 0;
    let high = found.table.thresholds.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (found.table.thresholds[middle] < threshold) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  }

  function move() {
    const threshold = Number(slider.value);
    const { table, used } = found;
    const row = findRow(threshold);
    const precision = table.precision[row];
    const x = ((threshold - found.low) / (found.high - found.low)) * WIDTH;
    const at = $("#histogram .at");
    at.setAttribute("x1", x);
    at.setAttribute("x2", x);
    for (const bar of $("#histogram").querySelectorAll("rect")) {
      bar.classList.toggle("below", Number(bar.dataset.high) <= threshold);
    }
    const ends = (interval) => `95 %: ${interval.map((each) => (100 * each).toFixed(0)).join("–")} %`;
    const intervals = {
      Precision: precision === null ? "" : ends(table.precision_interval[row]),
      Recall: ends(table.recall_interval[row]),
    };
    const says = {
      Precision: precision === null ? "–" : percent(precision),
      Recall: percent(table.recall[row]),
      F1: percent(table.f1[row]),
      Found: table.true_positives[row],
      Missed: table.false_negatives[row],
      "Wrongly found": table.false_positives[row],
      "Rightly left": table.true_negatives[row],
    };
    $("#threshold-value").textContent = threshold.toFixed(4);
    slider.setAttribute(
      "aria-valuetext",
      `${threshold.toFixed(4)}: precision ${says.Precision}, recall ${says.Recall}`,
    );
    $("#figures").replaceChildren(
      ...Object.entries(says).map(([name, value]) =>
        make(
          "div",
          {},
          make("dt", {}, name),
          make("dd", {}, String(value)),
          ...(intervals[name] ? [make("dd", { className: "note" }, intervals[name])] : []),
        ),
      ),
    );
    const wrong = used.filter((each) => !each.fits && each.similarity >= threshold);
    const missed = used.filter((each) => each.fits && each.similarity < threshold);
    wrong.sort((a, b) => b.similarity - a.similarity);
    missed.sort((a, b) => a.similarity - b.similarity);
    showMistakes([
      ["Wrongly found, the most similar first", wrong],
      ["Missed, the least similar first", missed],
    ]);
  }

  function showMistakes(lists) {
    const shown = lists.map(([, list]) => list.slice(0, MAX_MISTAKES));
    const same = shown.flat().map((each) => each.picture);
    if (found.mistakes?.length === same.length && same.every((each, i) => each === found.mistakes[i])) {
      return;
    }
    found.mistakes = same;
    $(".mistakes", results).replaceChildren(
      ...lists
        .filter(([, list]) => list.length)
        .map(([title, list]) =>
          make(
            "div",
            {},
            make("h2", {}, title),
            make(
              "ul",
              {},
              ...list.slice(0, MAX_MISTAKES).map(({ picture, similarity }) =>
                make(
                  "li",
                  { className: "tile", title: picture.path },
                  makeThumb(picture.url, picture.name),
                  make(
                    "div",
                    { className: "line" },
                    make("span", {}, labelOf(picture)),
                    make("span", {}, similarity.toFixed(3)),
                  ),
                ),
              ),
            ),
          ),
        ),
    );
  }

  async function savePolicy() {
    const { request, used } = found;
    const body = {
      label: request.labels[0],
      templates: request.templates,
      model: request.model,
      threshold: Number(slider.value),
      similarities: used.map((each) => each.similarity),
      is_positive: used.map((each) => each.fits),
    };
    showError(results);
    let text;
    try {
      text = await ask("/ui/policy", body, { read: (answer) => answer.text() });
    } catch (error) {
      showError(results, error.message);
      return;
    }
    const name = `${body.label.replaceAll(/[^\p{L}\p{N}]+/gu, "-").slice(0, 60)}-policy.json`;
    const url = URL.createObjectURL(new Blob([text], { type: "application/json" }));
    make("a", { href: url, download: name }).click();
    setTimeout(() => URL.revokeObjectURL(url), 1000);
    say(`Saved ${name}`);
  }

  function write(kind) {
    if (!found) {
      return null;
    }
    const { request, used } = found;
    const threshold = Number(slider.value);
    const files = used.map((each) => each.picture);
    if (kind === "curl") {
      const body = {
        similarities: used.map((each) => each.similarity),
        is_positive: used.map((each) => each.fits),
      };
      return `${curl("/v1/classify", request, files, settings)}\n${curl("/ui/thresholds", body, [], settings)}`;
    }
    const paths = (fits) =>
      python(used.filter((each) => each.fits === fits).map((each) => each.picture.path));
    const options = pythonOptions({ templates: request.templates });
    return (
      `import clip_rt\n\npositives = ${paths(true)}\nnegatives = ${paths(false)}\n` +
      `threshold = ${threshold}\n\n` +
      `with ${pythonClient(settings, request.model)} as client:\n` +
      `    scores = client.zero_shot([*positives, *negatives], ${python(request.labels)}${options})\n` +
      "is_found = scores.similarities[:, 0] >= threshold\n" +
      "num_right = int(is_found[: len(positives)].sum())\n" +
      'print("found", int(is_found.sum()), "of which right", num_right)\n' +
      'print("precision", num_right / max(int(is_found.sum()), 1))\n' +
      'print("recall", num_right / len(positives))\n'
    );
  }

  takePictures(view, $("#thresholds-drop"), (given) => {
    pictures = [...pictures, ...given];
    showClasses();
    refresh();
  });
  $("#thresholds-count button").addEventListener("click", () => {
    pictures.forEach((each) => each.drop());
    pictures = [];
    showClasses();
    refresh();
    $("#thresholds-drop button").focus();
  });
  $("#threshold-label").addEventListener("input", () => {
    isOwnLabel = Boolean($("#threshold-label").value.trim());
    change();
  });
  $("#loose-label").addEventListener("change", () => {
    showClasses();
    refresh();
  });
  slider.addEventListener("input", move);
  $("#best-f1").addEventListener("click", () => {
    slider.value = found.table.best_f1;
    move();
  });
  $("#save-policy").addEventListener("click", savePolicy);
  const drag = (event) => {
    if (event.buttons & 1) {
      const { left, width } = $("#histogram").getBoundingClientRect();
      slider.value = found.low + ((event.clientX - left) / width) * (found.high - found.low);
      move();
    }
  };
  $("#histogram").addEventListener("pointerdown", (event) => {
    $("#histogram").setPointerCapture(event.pointerId);
    drag(event);
    slider.focus({ preventScroll: true });
    event.preventDefault();
  });
  $("#histogram").addEventListener("pointermove", drag);
  setUpCopies(results, write);
  server.addEventListener("back", () => view.hidden || refresh());

  return { show: refresh, refresh };
}
