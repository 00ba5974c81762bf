// Forms that survive a reload, and their keys.

/** Fill a form with its values of the last visit, and keep them from now on. */
export function remember(form, name) {
  let stored = {};
  try {
    stored = JSON.parse(localStorage.getItem(name)) ?? {};
  } catch {
    // Not ours, or no storage: the form starts with its defaults.
  }
  for (const [field, value] of Object.entries(stored)) fill(form, field, value);
  const keep = () => {
    try {
      localStorage.setItem(name, JSON.stringify(Object.fromEntries(new FormData(form))));
    } catch {
      // No storage, or it is full.
    }
  };
  form.addEventListener("input", keep);
  form.addEventListener("change", keep);
}

/** Set a field if the form has it and, for a list of choices, the value. */
export function fill(form, name, value) {
  const field = form.elements.namedItem(name);
  if (!field || typeof value !== "string") return;
  const before = field.value;
  field.value = value;
  if (field instanceof HTMLSelectElement && field.selectedIndex < 0) field.value = before;
}

/** Tell those who listen to a form that a script has changed it. */
export const changed = (form) => form.dispatchEvent(new Event("input", { bubbles: true }));

/** Mark a button as usable or not. It keeps the focus, unlike with `disabled`. */
export const enable = (button, enabled) => button.setAttribute("aria-disabled", String(!enabled));
export const isEnabled = (button) => button.getAttribute("aria-disabled") !== "true";
