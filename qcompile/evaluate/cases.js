"use strict";
(() => {
  const root = document.documentElement;
  const remember = (key, value) => { try { localStorage.setItem("qcompile." + key, value); } catch { /* private mode */ } };
  const recall = (key) => { try { return localStorage.getItem("qcompile." + key); } catch { return null; } };
  const setLanguage = (language) => {
    root.dataset.lang = language;
    root.lang = language === "zh" ? "zh-CN" : "en";
  };

  const cases = [...document.querySelectorAll(".case")];
  const texts = new Map(cases.map((card) => [card, card.textContent.toLowerCase()]));
  const wanted = { type: "", verdict: "" };
  const search = document.getElementById("search");
  const has = (card, group, value) =>
    value === "" || card.dataset[group] === value || (group === "verdict" && card.dataset[value] === "1");
  const show = () => {
    const text = search.value.toLowerCase();
    let count = 0;
    for (const card of cases) {
      const fits = has(card, "type", wanted.type) && has(card, "verdict", wanted.verdict) && texts.get(card).includes(text);
      card.hidden = !fits;
      count += fits;
    }
    document.getElementById("shown").textContent = count;
  };
  for (const group of document.querySelectorAll(".group")) {
    const chips = [...group.querySelectorAll(".chip")];
    for (const chip of chips) {
      chip.setAttribute("aria-pressed", String(chip.dataset.value === ""));
      chip.addEventListener("click", () => {
        wanted[group.dataset.group] = chip.dataset.value;
        for (const other of chips) other.setAttribute("aria-pressed", String(other === chip));
        show();
      });
    }
  }
  search.addEventListener("input", show);
  document.querySelector(".filters").hidden = false;

  document.getElementById("language").addEventListener("click", () => {
    const language = root.dataset.lang === "zh" ? "en" : "zh";
    remember("language", language);
    setLanguage(language);
  });
  document.getElementById("theme").addEventListener("click", () => {
    const dark = root.dataset.theme === "dark" || (root.dataset.theme === "auto" && matchMedia("(prefers-color-scheme: dark)").matches);
    root.dataset.theme = dark ? "light" : "dark";
    remember("theme", root.dataset.theme);
  });
  root.dataset.theme = recall("theme") ?? "auto";
  setLanguage(recall("language") ?? (navigator.language.startsWith("zh") ? "zh" : "en"));
})();
