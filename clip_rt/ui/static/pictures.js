// Images that people choose, drop or paste; and how they are sent, a batch at a time.

import { $, plural, say } from "./dom.js";
import { ask } from "./api.js";

const SUFFIX = /\.(jpe?g|png|webp|bmp|gif)$/i;
const MAX_PICTURES = 2000;
const BATCH = { number: 16, bytes: 8 * 1024 * 1024 };
const NUM_WORKERS = 2;
const BASE64_GROWTH = 4 / 3;
let numPasted = 0;

/** An image that was chosen, and what came of it. */
export class Picture {
  answers = new Map();

  constructor(file, path) {
    this.file = file;
    this.path = path;
    this.name = path.split("/").at(-1);
    this.folder = path.split("/").at(-2) ?? "";
  }

  /** Where the page shows it from. */
  get url() {
    this.shown ??= URL.createObjectURL(this.file);
    return this.shown;
  }

  drop() {
    URL.revokeObjectURL(this.shown);
    this.shown = undefined;
  }
}

/** Let a view take images: by its buttons, dropped on it, or pasted while it is shown. */
export function takePictures(view, drop, onPictures) {
  const take = (pictures, isFolder) => {
    const kept = isFolder ? pictures.filter((each) => SUFFIX.test(each.name)) : pictures;
    if (pictures.length && !kept.length) {
      say("No image is in that folder.");
    } else if (kept.length > MAX_PICTURES) {
      say(`${plural(kept.length, "image")} are too many for a page; use clip-rt classify.`);
    } else if (kept.length) {
      onPictures(kept);
    }
  };
  for (const button of drop.querySelectorAll("[data-choose]")) {
    const isFolder = button.dataset.choose === "folder";
    const input = $(isFolder ? "#choose-folder" : "#choose-files");
    button.addEventListener("click", () => {
      input.value = "";
      input.onchange = () =>
        take(
          [...input.files].map((file) => new Picture(file, file.webkitRelativePath || file.name)),
          isFolder,
        );
      input.click();
    });
  }
  let depth = 0;
  const mark = () => view.classList.toggle("dragging", depth > 0);
  view.addEventListener("dragenter", () => {
    depth += 1;
    mark();
  });
  view.addEventListener("dragleave", () => {
    depth -= 1;
    mark();
  });
  view.addEventListener("dragover", (event) => event.preventDefault());
  view.addEventListener("drop", async (event) => {
    event.preventDefault();
    depth = 0;
    mark();
    // Before anything is awaited: then the event is over.
    const entries = [...event.dataTransfer.items]
      .map((item) => item.webkitGetAsEntry?.())
      .filter(Boolean);
    // Where a browser has no entries: files alone.
    const files = [...event.dataTransfer.files].map((file) => new Picture(file, file.name));
    const found = [];
    try {
      for (const entry of entries) {
        await walk(entry, "", found);
      }
    } catch {
      say("Not all of what was dropped can be read.");
    }
    const isFolder = entries.some((entry) => entry.isDirectory);
    take(entries.length ? found : files, isFolder);
  });
  document.addEventListener("paste", (event) => {
    if (view.hidden) {
      return;
    }
    const files = [...event.clipboardData.files];
    if (files.length) {
      event.preventDefault();
      take(
        files.map((file) => {
          numPasted += 1;
          return new Picture(file, `pasted-${numPasted}.${file.type.split("/")[1] || "png"}`);
        }),
        false,
      );
    }
  });
}

async function walk(entry, within, found) {
  if (entry.isFile) {
    const file = await new Promise((done, fail) => entry.file(done, fail));
    found.push(new Picture(file, within + entry.name));
    return;
  }
  if (entry.name.startsWith(".")) {
    return;
  }
  const reader = entry.createReader();
  for (;;) {
    // A hundred at a time, until there is none.
    const part = await new Promise((done, fail) => reader.readEntries(done, fail));
    if (!part.length) {
      return;
    }
    for (const each of part) {
      await walk(each, `${within}${entry.name}/`, found);
    }
  }
}

/** Return a file as base64. */
export function encode(file) {
  return new Promise((done, fail) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => fail(reader.error);
    reader.readAsDataURL(file);
  });
}

/** Return why a file is not sent; empty where it is. */
export function whyNotSent(file, settings) {
  if (file.size === 0) {
    return "is empty";
  }
  const limit = settings.max_body_bytes - 64 * 1024;
  return file.size * BASE64_GROWTH > limit
    ? `is larger than a request may be here, ${Math.floor(settings.max_body_bytes / 2 ** 20)} MiB`
    : "";
}

/** Yield pictures in groups that a request may hold. */
export function* batchUp(pictures, settings, most = { number: Infinity, bytes: Infinity }) {
  const maxBytes = Math.min(most.bytes, settings.max_body_bytes / 2);
  const maxNumber = Math.min(most.number, settings.max_items);
  let batch = [];
  let size = 0;
  for (const picture of pictures) {
    if (batch.length && (batch.length === maxNumber || size + picture.file.size > maxBytes)) {
      yield batch;
      batch = [];
      size = 0;
    }
    batch.push(picture);
    size += picture.file.size;
  }
  if (batch.length) {
    yield batch;
  }
}

/**
 * Classify images, and keep what came of each in its `answers` under a key.
 *
 * @param request What goes to /v1/classify beside the images.
 * @param onDone Called when some images have their answers.
 */
export async function classify(pictures, request, { settings, key, signal, onDone }) {
  const wanted = pictures.filter((picture) => !picture.answers.has(key));
  const sent = wanted.filter((picture) => {
    const error = whyNotSent(picture.file, settings);
    if (error) {
      picture.answers.set(key, { error });
    }
    return !error;
  });
  onDone(wanted.filter((picture) => picture.answers.has(key)));
  const batches = batchUp(sent, settings, BATCH);
  const work = async () => {
    for (const batch of batches) {
      await classifyBatch(batch, request, key, signal);
      onDone(batch);
    }
  };
  await Promise.all(Array.from({ length: NUM_WORKERS }, work));
}

async function classifyBatch(batch, request, key, signal) {
  const read = await Promise.allSettled(batch.map((picture) => encode(picture.file)));
  const readable = [];
  const images = [];
  for (const [index, { value, reason }] of read.entries()) {
    if (reason) {
      batch[index].answers.set(key, { error: `cannot be read: ${reason.message}` });
    } else {
      readable.push(batch[index]);
      images.push(value);
    }
  }
  if (!images.length) {
    return;
  }
  const answer = await ask("/v1/classify", { ...request, images, on_error: "skip" }, { signal });
  for (const { index, labels } of answer.data) {
    readable[index].answers.set(key, { labels });
  }
  for (const { index, message } of answer.errors) {
    const error = message.replace(/^(The image )?images\[\d+\] (\(bytes\) )?/, "");
    readable[index].answers.set(key, { error });
  }
}
