// Two views of the same images and labels: Classify, by one model, and Compare, by two.

import { $, debounce, linesOf, make, makeBars, makeThumb, plural } from "./dom.js";
import { server } from "./api.js";
import { classify, takePictures } from "./pictures.js";
import { curl, python, pythonClient, pythonOptions, setUpCopies } from "./code.js";
import { fillModels, setUpTemplates } from "./options.js";
import { Job } from "./job.js";

const WAIT_MS = 250;

export function startWork(context) {
  const { settings } = context;
  const view = $("#view-work");
  let pictures = [];
  let shown = "classify";
  const change = debounce(() => views[shown].refresh(), WAIT_MS);
  const readTemplates = setUpTemplates("", settings, change);

  /** Return what is asked of a model, but for the images. */
  const readRequest = (model) => {
    const labels = linesOf($("#labels").value);
    return {
      model,
      labels,
      templates: readTemplates(),
      top_k: Number($("#top").value) || labels.length + 1,
      none_of_these: $("#none").checked,
    };
  };

  const remove = (picture) => {
    pictures = pictures.filter((each) => each !== picture);
    picture.drop();
    countPictures();
    views[shown].refresh();
  };
  const countPictures = () => {
    const note = $("#work-count");
    note.hidden = !pictures.length;
    $("span", note).textContent = plural(pictures.length, "image");
  };

  const views = {
    classify: new WorkView($("#classify-results"), {
      settings,
      remove,
      readPictures: () => pictures,
      readRequests: () => [readRequest(context.model)],
    }),
    compare: new WorkView($("#compare-results"), {
      settings,
      remove,
      readPictures: () => pictures,
      readRequests: () => [readRequest($("#model-a").value), readRequest($("#model-b").value)],
    }),
  };

  takePictures(view, $("#work-drop"), (found) => {
    pictures = [...pictures, ...found];
    countPictures();
    views[shown].refresh();
  });
  $("#work-count button").addEventListener("click", () => {
    pictures.forEach((each) => each.drop());
    pictures = [];
    countPictures();
    views[shown].refresh();
    $("#work-drop button").focus();
  });
  $("#labels").addEventListener("input", change);
  for (const id of ["none", "top"]) {
    $(`#${id}`).addEventListener("change", change);
  }
  fillModels($("#model-a"), settings, 0);
  fillModels($("#model-b"), settings, 1);
  for (const id of ["model-a", "model-b"]) {
    $(`#${id}`).addEventListener("change", () => views.compare.refresh());
  }
  $("#only-different").addEventListener("change", () => views.compare.filter());
  server.addEventListener("back", () => view.hidden || views[shown].refresh());

  return {
    show(name) {
      shown = name;
      $("#classify-results").hidden = name !== "classify";
      $("#compare-results").hidden = name !== "compare";
      $("#work-title").textContent = name === "classify" ? "Classify" : "Compare";
      views[name].refresh();
    },
    refresh: () => views[shown].refresh(),
  };
}

const isSame = (a, b) =>
  a !== null &&
  a.pictures.length === b.pictures.length &&
  a.keys.every((key, index) => key === b.keys[index]) &&
  a.pictures.every((picture, index) => picture === b.pictures[index]);

/** The answers of one model, or of two side by side. */
class WorkView {
  #results;
  #job;
  #cards = new Map();
  #requests = [];
  #keys = [];
  #underWay = null;

  constructor(results, { settings, remove, readPictures, readRequests }) {
    this.#results = results;
    this.#job = new Job(results);
    Object.assign(this, { settings, remove, readPictures, readRequests });
    setUpCopies(results, (kind) => this.#write(kind));
  }

  get #isPair() {
    return this.#results.id === "compare-results";
  }

  async refresh() {
    const pictures = this.readPictures();
    this.#requests = this.readRequests();
    this.#keys = this.#requests.map((each) => JSON.stringify(each));
    this.#showEmpty(pictures);
    this.#placeCards(pictures);
    if (this.#isPair && this.settings.models.length < 2) {
      return;
    }
    if (!this.#requests[0].labels.length || !pictures.length) {
      this.#job.stop();
      this.#underWay = null;
      this.#say(pictures.length ? "Type at least one label." : "");
      return;
    }
    const keys = this.#keys;
    const asked = { keys, pictures };
    if (isSame(this.#underWay, asked)) {
      return;
    }
    const todo = pictures.filter((each) => keys.some((key) => !each.answers.has(key)));
    if (todo.length) {
      this.#say(`Asking about ${plural(todo.length, "image")} …`);
    }
    this.#underWay = asked;
    const ending = await this.#job.run(todo.length * keys.length, async (signal, advance) => {
      for (const [index, request] of this.#requests.entries()) {
        await classify(todo, request, {
          settings: this.settings,
          key: keys[index],
          signal,
          onDone: (done) => {
            if (isSame(this.#underWay, asked)) {
              done.forEach((each) => this.#fill(each));
              advance(done.length);
            }
          },
        });
      }
    });
    if (ending === "replaced") {
      return;
    }
    this.#underWay = null;
    const num = (test) => pictures.filter(test).length;
    const numBad = num((each) => this.#answersOf(each).some((answer) => answer?.error));
    const numWaiting = num((each) => this.#answersOf(each).includes(undefined));
    this.#say(
      [
        plural(pictures.length - numWaiting, "image"),
        ...(this.#isPair ? [`${num((each) => this.#differs(each))} differ`] : []),
        ...(numBad ? [`${numBad} could not be used`] : []),
        ...(numWaiting ? [`${numWaiting} not done`] : []),
      ].join(", "),
    );
    this.filter();
  }

  /** Hide the pairs that agree, where that is asked for. */
  filter() {
    const isOn = this.#isPair && $("#only-different").checked;
    for (const [picture, card] of this.#cards) {
      card.hidden = isOn && !this.#differs(picture);
    }
  }

  #say(text) {
    $(".status", this.#results).textContent = text;
  }

  #showEmpty(pictures) {
    const empty = $(".empty", this.#results);
    if (this.#isPair && this.settings.models.length < 2) {
      const name = this.settings.models[0].name;
      empty.replaceChildren(
        make("h2", {}, `Only ${name} is served here`),
        make("p", {}, "Serve a folder with two models or more, and this view compares them:"),
        make(
          "div",
          { className: "command" },
          make("code", {}, "clip-rt ui --repository model_repository"),
        ),
      );
      empty.hidden = false;
      return;
    }
    empty.hidden = pictures.length > 0;
  }

  #answersOf(picture) {
    return this.#keys.map((key) => picture.answers.get(key));
  }

  #differs(picture) {
    if (!this.#isPair) {
      return false;
    }
    const [a, b] = this.#answersOf(picture).map((answer) => answer?.labels?.[0].label);
    return a !== undefined && b !== undefined && a !== b;
  }

  #placeCards(pictures) {
    const list = $(".cards", this.#results);
    const kept = new Set(pictures);
    for (const [picture, card] of this.#cards) {
      if (!kept.has(picture)) {
        card.remove();
        this.#cards.delete(picture);
      }
    }
    for (const picture of pictures) {
      if (!this.#cards.has(picture)) {
        const card = this.#makeCard(picture);
        this.#cards.set(picture, card);
        list.append(card);
      }
      this.#fill(picture);
    }
  }

  #makeCard(picture) {
    const close = make(
      "button",
      { type: "button", className: "remove", ariaLabel: `Remove ${picture.name}` },
      "×",
    );
    close.addEventListener("click", () => {
      const next = card.nextElementSibling ?? card.previousElementSibling;
      this.remove(picture);
      ($(".remove", next ?? undefined) ?? $("#labels")).focus();
    });
    const card = make(
      "li",
      { className: this.#isPair ? "card pair" : "card" },
      makeThumb(picture.url, ""),
      make("p", { className: "name", title: picture.path }, picture.name),
      ...this.#keys.map(() => make("div", { className: "answer" })),
      close,
    );
    return card;
  }

  #fill(picture) {
    const card = this.#cards.get(picture);
    if (!card) {
      return;
    }
    const answers = this.#answersOf(picture);
    card.querySelectorAll(".answer").forEach((place, index) => {
      const answer = answers[index];
      if (answer === undefined) {
        // What it was stays, dimmed, until the new answer is here.
        place.classList.add("stale");
        if (!place.childElementCount && this.#requests[0].labels.length) {
          place.append(make("div", { className: "waiting" }));
        }
        return;
      }
      place.classList.remove("stale");
      place.replaceChildren(
        ...(this.#isPair ? [make("h3", {}, this.#requests[index].model)] : []),
        answer.error ? make("p", { className: "why" }, answer.error) : makeBars(answer.labels),
      );
    });
    card.classList.toggle("bad", answers.some((answer) => answer?.error));
    const differs = this.#differs(picture);
    card.classList.toggle("differs", differs);
    $(".tag", card)?.remove();
    if (differs) {
      $(".name", card).prepend(make("span", { className: "tag" }, "differs"), " ");
    }
  }

  #write(kind) {
    const pictures = this.readPictures();
    if (!pictures.length || !this.#requests[0]?.labels.length) {
      return null;
    }
    if (kind === "curl") {
      return this.#requests
        .map((request) =>
          curl("/v1/classify", { ...request, on_error: "skip" }, pictures, this.settings),
        )
        .join("\n");
    }
    const [{ labels, templates, none_of_these, top_k }] = this.#requests;
    const options = pythonOptions({ templates, none_of_these, on_error: "skip" });
    const head =
      `import clip_rt\n\nimages = ${python(pictures.map((each) => each.path))}\n` +
      `labels = ${python(labels)}\n\n`;
    if (!this.#isPair) {
      return (
        `${head}with ${pythonClient(this.settings, this.#requests[0].model)} as client:\n` +
        `    scores = client.zero_shot(images, labels${options})\n` +
        `for index, ranked in zip(scores.indices, scores.top(${top_k})):\n` +
        '    print(images[index], ", ".join(f"{label} {share:.1%}" for label, share in ranked))\n' +
        "for failure in scores.failures:\n" +
        '    print(images[failure.index], "error:", failure)\n'
      );
    }
    const [a, b] = this.#requests.map((each) => pythonClient(this.settings, each.model));
    return (
      `${head}with ${a} as client_a, ${b} as client_b:\n` +
      `    a = client_a.zero_shot(images, labels${options})\n` +
      `    b = client_b.zero_shot(images, labels${options})\n` +
      "for index, label_a, label_b in zip(a.indices, a.best, b.best):\n" +
      '    print(images[index], label_a, label_b, "" if label_a == label_b else "differs")\n'
    );
  }
}
