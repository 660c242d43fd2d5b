// Before the first paint: the colours that were chosen here last.
"use strict";
{
  const chosen = localStorage.getItem("aerie:theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
}
