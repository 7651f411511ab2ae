// What a view is doing now: one thing at a time, with its progress, which can be stopped.

import { $, showError } from "./dom.js";
import { Gone } from "./api.js";

export class Job {
  #results;
  #controller;

  constructor(results) {
    this.#results = results;
    $(".stop", results)?.addEventListener("click", () => this.stop());
  }

  stop() {
    this.#controller?.abort();
  }

  /**
   * Do something in place of what was done before.
   *
   * @param total How many images there are to do, for the progress.
   * @param work Takes a signal, and a function to call with how many were done.
   * @returns How it ended: "done"; "failed", as the view then says; "gone" with its server;
   *   "stopped"; or "replaced" by what came after it.
   */
  async run(total, work) {
    this.stop();
    const controller = new AbortController();
    this.#controller = controller;
    const isCurrent = () => this.#controller === controller;
    const bar = $("progress", this.#results);
    const stop = $(".stop", this.#results);
    let done = 0;
    const advance = (number) => {
      done += number;
      if (bar && isCurrent()) {
        bar.value = total ? done / total : 1;
        bar.hidden = stop.hidden = total < 2 || done >= total;
      }
    };
    showError(this.#results);
    advance(0);
    try {
      await work(controller.signal, advance);
      return isCurrent() ? "done" : "replaced";
    } catch (error) {
      // What else is under way for it.
      controller.abort();
      if (!isCurrent()) {
        return "replaced";
      }
      if (error.name === "AbortError") {
        return "stopped";
      }
      if (error instanceof Gone) {
        return "gone";
      }
      showError(this.#results, error.message);
      return "failed";
    } finally {
      if (bar && isCurrent()) {
        bar.hidden = stop.hidden = true;
      }
    }
  }
}
