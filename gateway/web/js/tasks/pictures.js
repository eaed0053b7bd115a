// Pictures behind an API key: fetched with it, shown as blobs, and let go of again.

import { persist, picture, Problem } from "../api.js";
import { h } from "../dom.js";

const TRIES = 5; // at a picture, while the gateway is away or too busy
const AHEAD = "300px"; // of the window, from which on a thumbnail is fetched

/** A path of an answer, relative to this page. */
const local = (path) => path.replace(/^\//, "");

/** Return `thumbnail(url, alt)`, an element that fetches its picture once it comes into view; null for no picture. */
export function thumbnails(signal) {
  const coming = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      if (!isIntersecting) continue;
      coming.unobserve(target);
      fill(target, target.dataset.url, signal);
    }
  }, { rootMargin: AHEAD });
  signal.addEventListener("abort", () => coming.disconnect());
  return (url, alt = "") => {
    const image = h("img", { class: "thumb", alt, width: 64, height: 64, hidden: true });
    const frame = h("span", { class: "thumb-frame" }, image);
    if (url) {
      frame.dataset.url = url;
      coming.observe(frame);
    }
    return frame;
  };
}

const fetched = (path, signal) => persist(() => picture(path, signal), { signal, most: TRIES });

async function fill(frame, path, signal) {
  const blob = await fetched(local(path), signal).catch((error) => {
    if (signal.aborted || error instanceof Problem) return null; // it is gone by now: the frame stays empty
    throw error;
  });
  if (!blob) return;
  const url = URL.createObjectURL(blob);
  const image = frame.firstChild;
  image.onload = image.onerror = () => URL.revokeObjectURL(url);
  image.src = url;
  image.hidden = false;
}

/** Return the finished pictures of a task, each with its seed and links to open and save it. Their blobs live as long as `signal`. */
export function gallery(task, signal, under = () => null) {
  return h("div", { class: "gallery" }, task.images.map((image, index) => figure(task, image, index, signal, under)));
}

/** Make `canvas` as large as a picture of so many pixels is shown, so that nothing moves when that comes. */
export function frame(canvas, width, height) {
  canvas.style.aspectRatio = `${width} / ${height}`;
  canvas.style.maxWidth = `min(max(20rem, ${width}px), calc(75vh * ${width} / ${height}))`;
}

function figure(task, image, index, signal, under) {
  const name = `${task.task_id}-${index}.${image.format}`;
  const shown = h("img", { alt: task.request.prompt });
  const open = h("a", { target: "_blank", rel: "noopener" }, "Open");
  const save = h("a", { download: name }, "Download");
  const actions = h("span", { class: "row actions" }, open, save, under(image, index));
  const facts = `${image.width} × ${image.height} · ${image.format} · ${kib(image.bytes)} · seed ${image.seed}`;
  const canvas = h("div", { class: "canvas" }, shown);
  frame(canvas, image.width, image.height);
  const element = h("figure", {}, canvas, h("figcaption", {}, h("span", { class: "faint number" }, facts), actions));
  fetched(`${local(image.url)}?via=gateway`, signal).then((blob) => {
    const url = URL.createObjectURL(blob);
    signal.addEventListener("abort", () => URL.revokeObjectURL(url));
    shown.src = open.href = save.href = url;
  }).catch((error) => {
    if (!signal.aborted) canvas.replaceChildren(h("p", { class: "bad" }, error.message));
  });
  return element;
}

const kib = (bytes) => (bytes < 1 << 20 ? `${Math.ceil(bytes / 1024)} KiB` : `${(bytes / (1 << 20)).toFixed(1)} MiB`);
