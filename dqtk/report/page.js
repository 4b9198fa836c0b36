// Dividers and difference views of the image pairs, players of the clips. Everything else on the page works without scripts.
for (const pair of document.querySelectorAll(".pair")) {
  const range = pair.querySelector("input[type=range]");
  const stage = pair.querySelector(".stage");
  const toggle = pair.querySelector("button");

  const place = () => {
    pair.style.setProperty("--split", range.value + "%");
    range.setAttribute("aria-valuetext", range.value + " % original, " + (100 - range.value) + " % candidate");
  };
  range.addEventListener("input", place);
  place();

  const follow = (event) => {
    const box = stage.getBoundingClientRect();
    range.value = Math.round((100 * (event.clientX - box.left)) / box.width);
    place();
  };
  stage.addEventListener("pointerdown", (event) => {
    if (event.button !== 0 || pair.classList.contains("difference")) return;
    stage.setPointerCapture(event.pointerId);
    follow(event);
  });
  stage.addEventListener("pointermove", (event) => {
    if (stage.hasPointerCapture(event.pointerId)) follow(event);
  });

  toggle.addEventListener("click", () => show(pair, toggle.getAttribute("aria-pressed") !== "true"));
}

function show(pair, difference) {
  pair.classList.toggle("difference", difference);
  pair.querySelector("button").setAttribute("aria-pressed", String(difference));
  pair.querySelector("input[type=range]").disabled = difference;
}

const all = document.querySelector("#all-differences");
if (all) {
  all.addEventListener("click", () => {
    const difference = all.getAttribute("aria-pressed") !== "true";
    all.setAttribute("aria-pressed", String(difference));
    for (const pair of document.querySelectorAll(".pair")) show(pair, difference);
  });
}

const players = new Map([...document.querySelectorAll(".player")].map((player) => [player, wire(player)]));
for (const everyone of document.querySelectorAll(".play-all")) {
  everyone.hidden = false;
  everyone.addEventListener("click", () => {
    const on = everyone.getAttribute("aria-pressed") !== "true";
    everyone.setAttribute("aria-pressed", String(on));
    everyone.textContent = on ? "Pause all" : "Play all";
    for (const player of everyone.closest("section").querySelectorAll(".player")) {
      if (on) players.get(player).show(0);
      players.get(player).play(on);
    }
  });
}
