"use strict";
(() => {
  const root = document.documentElement;
  const sections = JSON.parse(document.getElementById("data").textContent);
  const tip = document.getElementById("tip");
  const chosen = sections.map(() => 0);
  const words = {
    en: { in: "in", weight: "weight", out: "out", layer: "Names and weights of layer" },
    zh: { in: "输入", weight: "权重", out: "输出", layer: "当前显示的名称与权重所属层：" },
  };

  const remember = (key, value) => { try { localStorage.setItem("qcompile." + key, value); } catch { /* private mode */ } };
  const recall = (key) => { try { return localStorage.getItem("qcompile." + key); } catch { return null; } };
  const say = (key) => words[root.dataset.lang][key];

  const setLanguage = (language) => {
    root.dataset.lang = language;
    root.lang = language === "zh" ? "zh-CN" : "en";
    sections.forEach((_, number) => showChosen(number));
  };
  const showChosen = (number) => {
    const { layers } = sections[number];
    const line = document.querySelector(`.card[data-section="${number}"] .chosen`);
    line.hidden = layers.length < 2;
    line.textContent = `${say("layer")} ${layers[chosen[number]]}`;
    for (const cell of document.querySelectorAll(`.cell[data-section="${number}"]`)) {
      const open = document.querySelector(`.card[data-section="${number}"]`).open;
      cell.setAttribute("aria-pressed", String(open && Number(cell.dataset.layer) === chosen[number]));
    }
  };

  const line = (list, label, text, small) => {
    const term = document.createElement("dt");
    const value = document.createElement("dd");
    term.textContent = label;
    value.textContent = text;
    if (small) {
      const note = document.createElement("small");
      note.textContent = small;
      value.append(note);
    }
    list.append(term, value);
  };
  const fill = (box) => {
    tip.replaceChildren();
    const title = document.createElement("b");
    const list = document.createElement("dl");
    tip.append(title);
    if (box.dataset.n === undefined) {
      title.textContent = box.querySelector("text").textContent;
      if (box.dataset.t) line(list, "", box.dataset.t);
    } else {
      const number = Number(box.closest("svg").dataset.section);
      const op = sections[number].ops[box.dataset.n];
      const names = sections[number].names[chosen[number]][box.dataset.n];
      title.textContent = op.op;
      const name = document.createElement("div");
      name.className = "name";
      name.textContent = names[0];
      tip.append(name);
      op.in.forEach(([kind, text], i) => {
        if (kind !== "-") line(list, kind === "w" ? say("weight") : say("in"), text, names[i + 1]);
      });
      op.out.forEach((text) => line(list, say("out"), text));
      op.attrs.forEach(([key, text]) => line(list, key, text));
    }
    tip.append(list);
  };
  const place = (event) => {
    const { width, height } = tip.getBoundingClientRect();
    const x = event.clientX + 16 + width > innerWidth ? event.clientX - 16 - width : event.clientX + 16;
    const y = Math.min(event.clientY + 14, innerHeight - height - 8);
    tip.style.left = `${Math.max(8, x)}px`;
    tip.style.top = `${Math.max(8, y)}px`;
  };
  const light = (box, on) => {
    const index = box.dataset.i;
    for (const wire of box.closest("svg").querySelectorAll(`.wire[data-a="${index}"], .wire[data-b="${index}"]`)) {
      wire.classList.toggle("lit", on);
    }
  };
  for (const box of document.querySelectorAll(".box")) {
    box.querySelector("title")?.remove();
    box.addEventListener("pointerenter", (event) => { fill(box); tip.hidden = false; place(event); light(box, true); });
    box.addEventListener("pointermove", place);
    box.addEventListener("pointerleave", () => { tip.hidden = true; light(box, false); });
  }

  for (const cell of document.querySelectorAll(".cell")) {
    cell.addEventListener("click", () => {
      const number = Number(cell.dataset.section);
      const card = document.querySelector(`.card[data-section="${number}"]`);
      chosen[number] = Number(cell.dataset.layer);
      card.open = true;
      showChosen(number);
      card.scrollIntoView({ block: "nearest", behavior: "smooth" });
    });
  }
  document.querySelectorAll(".card").forEach((card) => {
    card.addEventListener("toggle", () => showChosen(Number(card.dataset.section)));
  });

  let picked = null;
  for (const chip of document.querySelectorAll(".chip")) {
    chip.setAttribute("aria-pressed", "false");
    chip.addEventListener("click", () => {
      picked = picked === chip.dataset.role ? null : chip.dataset.role;
      document.body.classList.toggle("picking", picked !== null);
      for (const other of document.querySelectorAll(".chip")) {
        other.setAttribute("aria-pressed", String(other.dataset.role === picked));
      }
      for (const part of document.querySelectorAll(".lane, .box, .stage")) {
        part.classList.toggle("picked", picked !== null && part.classList.contains(`r-${picked}`));
      }
    });
  }

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
