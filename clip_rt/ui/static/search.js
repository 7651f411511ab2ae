// Search: images of an index by words, by images, or both; and near-duplicates.

import { $, make, makeThumb, plural, showError } from "./dom.js";
import { ask, hasToken, server } from "./api.js";
import { encode, takePictures, whyNotSent } from "./pictures.js";
import { copy, curl, python, pythonClient, setUpCopies, shell } from "./code.js";
import { Job } from "./job.js";

export function startSearch(context) {
  const { settings } = context;
  const view = $("#view-search");
  const results = $("#search-results");
  const gallery = $(".gallery", results);
  const job = new Job(results);
  let index = null;
  let images = [];
  let like = [];
  let last = null;

  const status = (text) => {
    $(".status", results).textContent = text;
  };

  function setDisabled(isDisabled) {
    for (const each of view.querySelectorAll("#search-form button, #search-form input")) {
      each.disabled = isDisabled;
    }
  }

  async function lookForIndex() {
    try {
      index = await ask("/ui/index");
    } catch (error) {
      showError(results, error.message);
      return;
    }
    const empty = $(".empty", results);
    setDisabled(Boolean(index.problem));
    if (!index.problem) {
      $("#index-note").textContent = index.images
        ? `${plural(index.images, "image")} of ${index.folders.join(", ")}`
        : "The index has no image yet.";
      empty.replaceChildren(
        make("h2", {}, "Find images of your own"),
        make("p", {}, `By words, by an image, or both, among ${plural(index.images, "image")}.`),
      );
      return;
    }
    $("#index-note").textContent = "";
    const command = `clip-rt index ${index.is_default ? "" : `--index ${shell(index.folder)} `}~/Pictures`;
    const copied = make("button", { type: "button" }, "Copy");
    copied.addEventListener("click", () => copy(command, "Copied"));
    const again = make("button", { type: "button", className: "primary" }, "Look again");
    again.addEventListener("click", lookForIndex);
    empty.replaceChildren(
      make("h2", {}, "There is no index to search yet"),
      make("p", {}, index.problem[0].toUpperCase() + index.problem.slice(1)),
      make("p", {}, "An index is made once, and kept up to date by the same command:"),
      make("div", { className: "command" }, make("code", {}, command), copied),
      again,
    );
    empty.hidden = false;
    gallery.replaceChildren();
  }

  function showImages() {
    $("#search-images").replaceChildren(
      ...images.map((picture) =>
        makeChip(makeThumb(picture.url, picture.name), picture.name, () => {
          images = images.filter((each) => each !== picture);
          picture.drop();
        }),
      ),
      ...like.map((hit) =>
        makeChip(makeIndexThumb(hit), nameOf(hit), () => {
          like = like.filter((each) => each !== hit);
        }),
      ),
    );
  }

  function makeChip(thumb, name, remove) {
    const button = make("button", { type: "button", ariaLabel: `Remove ${name}` }, "×");
    button.addEventListener("click", () => {
      remove();
      showImages();
      $("#words").focus();
    });
    return make("li", {}, thumb, button);
  }

  /** Where the form is above the results, scroll past it. */
  function showResults() {
    if (matchMedia("(max-width: 60rem)").matches) {
      results.scrollIntoView();
    }
  }

  async function search() {
    const words = $("#words").value;
    if (!words.trim() && !images.length && !like.length) {
      showError(results, "Type words, or add an image.");
      $("#words").focus();
      return;
    }
    const refused = images.find((picture) => whyNotSent(picture.file, settings));
    if (refused) {
      showError(results, `${refused.name} ${whyNotSent(refused.file, settings)}.`);
      return;
    }
    const request = {
      words,
      model: context.model,
      top: Number($("#search-top").value),
      like: like.map((hit) => hit.sha256),
    };
    const asked = { request, images, like };
    status("Searching …");
    const ending = await job.run(1, async (signal) => {
      const encoded = await Promise.all(images.map((picture) => encode(picture.file)));
      const answer = await ask("/ui/search", { ...request, images: encoded }, { signal });
      last = { ...asked, answer };
      $(".empty", results).hidden = true;
      gallery.replaceChildren(...answer.data.map((hit) => makeTile(hit)));
      showResults();
      const minus = answer.minus_texts.map((text) => ` without “${text}”`).join("");
      status(
        `${plural(answer.data.length, "image")}${minus}, similarity from ` +
          `${answer.data.at(-1)?.score.toFixed(3)} to ${answer.data[0]?.score.toFixed(3)}`,
      );
    });
    if (ending !== "done" && ending !== "replaced") {
      status("");
    }
  }

  async function findDuplicates() {
    const request = { threshold: Number($("#duplicate-cosine").value) };
    status("Comparing all images with each other …");
    const ending = await job.run(1, async (signal) => {
      const answer = await ask("/ui/duplicates", request, { signal });
      last = { request, answer, isDuplicates: true };
      $(".empty", results).hidden = true;
      gallery.replaceChildren(
        ...answer.data.flatMap((group, number) => [
          make("h2", {}, `Group ${number + 1}, ${plural(countFiles(group), "file")}`),
          ...group.map((hit) => makeTile(hit)),
        ]),
      );
      showResults();
      status(
        answer.num_groups
          ? `${plural(answer.num_groups, "group")} of near-duplicates`
          : "No two images are that near.",
      );
    });
    if (ending !== "done" && ending !== "replaced") {
      status("");
    }
  }

  function makeTile(hit) {
    const more = make("button", { type: "button", className: "link" }, "More like this");
    more.addEventListener("click", () => {
      like = [hit];
      images.forEach((each) => each.drop());
      images = [];
      $("#words").value = "";
      showImages();
      search();
      scrollTo(0, 0);
    });
    const path = make("button", { type: "button", className: "link" }, "Copy path");
    path.addEventListener("click", () => copy(hit.path, "Copied the path"));
    const num = hit.copies.length;
    const copies = num ? `, ${num} ${num === 1 ? "copy" : "copies"}` : "";
    return make(
      "figure",
      { className: "tile" },
      makeIndexThumb(hit),
      make(
        "figcaption",
        {},
        make(
          "div",
          { className: "line" },
          make("span", { title: [hit.path, ...hit.copies].join("\n") }, nameOf(hit)),
          make("span", {}, hit.score.toFixed(3)),
        ),
        make("p", { className: "note" }, `${hit.width_px} × ${hit.height_px}${copies}`),
        make("div", { className: "row" }, more, path),
      ),
    );
  }

  function write(kind) {
    if (!last) {
      return null;
    }
    const { request, answer, isDuplicates } = last;
    const opened = `Index.open(${python(index.folder)}) as index:\n`;
    if (isDuplicates) {
      return kind === "curl"
        ? curl("/ui/duplicates", request, [], settings)
        : `from clip_rt.search import Index\n\nwith ${opened}` +
            `    for group in index.duplicates(threshold=${request.threshold}):\n` +
            "        print([hit.path for hit in group])\n";
    }
    if (kind === "curl") {
      return curl("/ui/search", request, last.images, settings);
    }
    const wanted = [...last.images.map((each) => each.path), ...last.like.map((each) => each.path)];
    const parts = Object.entries({
      texts: answer.texts,
      images: wanted,
      minus_texts: answer.minus_texts,
    }).filter(([, values]) => values.length);
    return (
      "import clip_rt\nfrom clip_rt.search import Index, Query\n\n" +
      `query = Query(${parts.map(([name, values]) => `${name}=${python(values)}`).join(", ")})\n` +
      `with ${pythonClient(settings, request.model)} as client, ${opened}` +
      `    for hit in index.query(client, query, top=${request.top}):\n` +
      '        print(f"{hit.score:.3f}", hit.path)\n'
    );
  }

  takePictures(view, $("#search-drop"), (found) => {
    images = [...images, ...found];
    showImages();
    search();
  });
  $("#search-form").addEventListener("submit", search);
  setDisabled(false);
  $("#find-duplicates").addEventListener("click", findDuplicates);
  setUpCopies(results, write);
  server.addEventListener("back", () => view.hidden || lookForIndex());

  return {
    show: lookForIndex,
    refresh: () => last && !last.isDuplicates && search(),
  };
}

const nameOf = (hit) => hit.path.split(/[/\\]/).at(-1);
const countFiles = (group) => group.reduce((sum, hit) => sum + 1 + hit.copies.length, 0);

/** Return the place of an image of the index; it is shown by its hash. */
function makeIndexThumb(hit) {
  const thumb = makeThumb("", "");
  const image = make("img", { alt: nameOf(hit), loading: "lazy", decoding: "async" });
  const path = `/ui/thumbnails/${hit.sha256}`;
  const fail = () => thumb.replaceChildren(make("span", { className: "note" }, "gone or changed"));
  image.addEventListener("error", fail);
  thumb.append(image);
  if (!hasToken()) {
    image.src = path;
    return thumb;
  }
  // An image by itself would bring no token.
  ask(path, undefined, { read: (answer) => answer.blob() })
    .then((blob) => {
      const url = URL.createObjectURL(blob);
      image.addEventListener("load", () => URL.revokeObjectURL(url), { once: true });
      image.loading = "eager";
      image.src = url;
    })
    .catch(fail);
  return thumb;
}
