// Light, dark, or as the computer has it. Loaded before the page is first drawn, so that it never flashes.

import { h } from "./dom.js";

const KEPT = "zfleet.theme";
const THEMES = ["auto", "light", "dark"];

const current = () => (THEMES.includes(localStorage.getItem(KEPT)) ? localStorage.getItem(KEPT) : "auto");

function choose(theme) {
  localStorage.setItem(KEPT, theme);
  document.documentElement.dataset.theme = theme;
}

/** A button that goes from one theme to the next. */
export function themeButton() {
  const label = () => `Theme: ${current()}`;
  const button = h("button", { type: "button", class: "quiet" }, label());
  button.addEventListener("click", () => {
    choose(THEMES[(THEMES.indexOf(current()) + 1) % THEMES.length]);
    button.textContent = label();
  });
  return button;
}

document.documentElement.dataset.theme = current();
