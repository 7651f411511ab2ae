// Fields that several views have: templates.

import { $, linesOf, make } from "./dom.js";

const OWN = "own";

/** Fill the choice of templates, and show the field for one's own where that is chosen. */
export function setUpTemplates(prefix, settings, onChange) {
  const select = $(`#${prefix}templates`);
  const own = $(`#${prefix}own-templates`);
  select.replaceChildren(
    make("option", { value: "" }, settings.default_template),
    ...settings.template_sets.map((name) => make("option", { value: name }, `Set ${name}`)),
    make("option", { value: OWN }, "My own"),
  );
  select.addEventListener("change", () => {
    own.hidden = select.value !== OWN;
    if (!own.hidden) {
      own.focus();
    }
    onChange();
  });
  own.addEventListener("input", onChange);
  /** As a request has them: null, the name of a set, or a list. */
  return () => {
    if (select.value !== OWN) {
      return select.value || null;
    }
    const lines = linesOf(own.value);
    return lines.length ? lines : null;
  };
}

/** Fill a choice of models. */
export function fillModels(select, settings, chosen = 0) {
  select.replaceChildren(
    ...settings.models.map(({ name }, index) =>
      make("option", { value: name, selected: index === chosen }, name),
    ),
  );
  select.disabled = settings.models.length < 2;
}
