// Sheets of frames, drawn frame by frame, two of them beside their difference. One clock moves every player that plays.
"use strict";

const playing = new Set();
let clock = null;

function wire(player) {
  const film = JSON.parse(player.dataset.film);
  const sheets = [...player.querySelectorAll("img")];
  const canvases = [...player.querySelectorAll("canvas:not(.apart)")];
  const pens = canvases.map((canvas) => canvas.getContext("2d"));
  const apart = player.querySelector("canvas.apart")?.getContext("2d");
  const scrubber = player.querySelector("input");
  const button = player.querySelector(".play");
  const said = player.querySelector("output");
  const { width, height } = canvases[0];
  player.classList.toggle("pixels", Math.max(width, height) < 256);

  const put = (pen, sheet, frame) => {
    const x = (frame % film.columns) * width, y = Math.floor(frame / film.columns) * height;
    pen.drawImage(sheet, x, y, width, height, 0, 0, width, height);
  };
  const show = (frame) => {
    sheets.forEach((sheet, i) => put(pens[i], sheet, frame));
    if (apart) {
      apart.globalCompositeOperation = "copy";
      put(apart, sheets[0], frame);
      apart.globalCompositeOperation = "difference";
      put(apart, sheets[1], frame);
    }
    scrubber.value = frame;
    const words = `frame ${frame * film.every + 1} of ${film.of}`;
    scrubber.setAttribute("aria-valuetext", [words, film.values[frame]].filter(Boolean).join(", "));
    said.replaceChildren(words, ...(film.values.length ? [document.createElement("br"), film.values[frame]] : []));
  };
  const play = (on) => {
    button.textContent = on ? "Pause" : "Play";
    button.setAttribute("aria-pressed", String(on));
    on ? playing.add(self) : playing.delete(self);
    if (on && clock === null) clock = setInterval(() => playing.forEach((other) => other.step()), 1000 / film.rate);
    if (!playing.size && clock !== null) { clearInterval(clock); clock = null; }
  };
  const self = { show, play, step: () => show((Number(scrubber.value) + 1) % film.frames) };

  Promise.all(sheets.map((sheet) => sheet.decode())).then(() => {
    sheets.forEach((sheet) => { sheet.hidden = true; });
    for (const hidden of player.querySelectorAll("canvas[hidden], figure[hidden], .reel[hidden]")) hidden.hidden = false;
    scrubber.addEventListener("input", () => { play(false); show(Number(scrubber.value)); });
    button.addEventListener("click", () => play(button.getAttribute("aria-pressed") !== "true"));
    button.setAttribute("aria-pressed", "false");
    show(0);
    player.classList.add("ready");
  });
  return self;
}
