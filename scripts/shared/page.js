// The page of scripts/reproduce.py: sliders, and how it fills while VERSION is not the last one, "".

// What a slider at s does to an image. As one steps back to eight times the distance, the image shrinks to an eighth,
// and half a pixel of the screen, which is about what the eye resolves, becomes ever more of it.
const PLAY = {
  turn: (image, s) => { image.style.transform = `perspective(60rem) rotateX(${180 * s}deg)` },
  away: (image, s) => {
    image.style.transform = `scale(${8 ** -s})`
    image.style.filter = `blur(${(8 ** s - 1) / 2}px)`
  },
  scrub: (image, s) => { image.src = JSON.parse(image.dataset.frames)[s] },
}

for (const figure of document.querySelectorAll("[data-play]")) {
  const slider = figure.querySelector("input"), labels = JSON.parse(figure.dataset.labels)
  slider.hidden = false
  slider.oninput = () => {
    for (const image of figure.querySelectorAll("img")) PLAY[figure.dataset.play](image, slider.value)
    figure.querySelector("output").textContent = labels[slider.value] ?? ""
  }
  slider.oninput()
}

// alive.js, which changes every two seconds, calls alive(). Ends with the last version, or when nothing stirs for 20 s.
let beat, stirred = Date.now(), touched = 0
addEventListener("input", () => { touched = Date.now() })

function alive(version, count) {
  if (version !== VERSION && Date.now() - touched > 5000) location.reload()
  if (count !== beat) [beat, stirred] = [count, Date.now()]
}

function look() {
  if (Date.now() - stirred > 20000) {
    const ended = "The process that made this page has ended; the same command goes on from here."
    document.getElementById("making").textContent = ended
    return
  }
  const script = document.createElement("script")
  script.src = "alive.js?" + Date.now()
  script.onload = script.onerror = () => { script.remove(); setTimeout(look, 2000) }
  document.head.append(script)
}

if (VERSION) look()
