// Hears keys, clicks and photos within the element of class "labeller" it is in; sends each with its question's token.

const KEYS = new Set([..."123456789?", "Enter", "Backspace", "ArrowLeft", "ArrowRight"]);
const CHUNK = 1 << 20;      // bytes of a photo that are sent at once
const DOUBLE = 400;         // ms after a new picture in which a second click is half of a double click
const PATIENCE = 4000;      // ms without an answer of the kernel

const named = (node, prefix) => [...node.classList].find((name) => name.startsWith(prefix)).slice(prefix.length);

async function begin({ model, el }, root, signal) {
  const listen = (where, event, hear, capture = false) => where.addEventListener(event, hear, { signal, capture });
  const focus = () => root.focus({ preventScroll: true });

  // ---- one answer to one question

  let waiting = 0;          // the token that a press would answer
  let painted = 0;          // when what is on screen was painted
  let alarm;

  const unlock = async () => {
    const token = model.get("token");
    const photo = root.querySelector("img.photo");
    if (photo?.offsetParent) await photo.decode().catch(() => {});
    if (token !== model.get("token")) return;
    clearTimeout(alarm);
    el.textContent = "";
    painted = performance.now();
    waiting = token;
    root.dataset.token = token;
  };

  const press = (what, text = "") => {
    if (waiting !== model.get("token") || !waiting) return;
    model.send({ press: what, text, token: waiting });
    waiting = 0;
    if (what === "name") return;
    alarm = setTimeout(() => {
      el.textContent = model.get("silence");
    }, PATIENCE);
  };

  // ---- keys

  const inField = (event, field) => {
    const what = field.closest("[class*=enter-]");
    if (event.key === "Enter" && what) press(named(what, "enter-"), field.value);
    else if (event.key !== "Escape") return false;
    focus();
    return true;
  };

  const inLabeller = (event) => {
    if (event.key === "/") {
      const find = root.querySelector(".filter input:not([disabled])") ?? root.querySelector(".new-class input");
      find?.focus();
      return true;
    }
    if (!KEYS.has(event.key)) return false;
    if (!event.repeat) press(event.key);                       // a key that is held down is one press
    return true;
  };

  const onKey = (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const field = event.target.closest("input, select, textarea");
    const taken = field ? inField(event, field) : inLabeller(event);
    if (!taken) return;
    event.preventDefault();
    event.stopPropagation();
  };

  root.tabIndex = 0;
  root.dataset.lmSuppressShortcuts = true;                     // else JupyterLab takes 1 for "make this a heading"
  listen(root, "keydown", onKey, true);                        // before the text field, which lets nothing through
  listen(document, "keydown", (event) => {
    if (event.target === document.body && document.querySelector(".labeller") === root) onKey(event);
  });

  // ---- clicks

  const onClick = (event) => {
    const button = event.target.closest("[class*=press-]");
    if (!button || !root.contains(button)) return;
    event.stopPropagation();
    event.preventDefault();
    const what = named(button, "press-");
    if (what === "photos") {
      chooser.click();
      return;
    }
    const doubled = event.detail > 1 && performance.now() - painted < DOUBLE;
    if (!doubled) press(what, root.querySelector(`.enter-${what} input`)?.value);
    focus();
  };
  listen(root, "click", onClick, true);

  // ---- photos, chosen or dropped: one after the other, in pieces that are acknowledged

  const chooser = document.createElement("input");
  Object.assign(chooser, { type: "file", multiple: true, accept: "image/*", hidden: true });
  el.after(chooser);

  let acknowledged = () => {};
  let uploads = Promise.resolve();

  const send = (file, start, piece, n, of) =>
    new Promise((resolve) => {
      acknowledged = resolve;
      model.send({ file: file.name, size: file.size, start, n, of }, undefined, [new DataView(piece)]);
    });

  const upload = async (files) => {
    for (const [n, file] of files.entries()) {
      let more = true;
      for (let start = 0; more && start < Math.max(file.size, 1); start += CHUNK) {
        const piece = await file.slice(start, start + CHUNK).arrayBuffer();
        more = await send(file, start, piece, n + 1, files.length);
      }
    }
  };

  const queue = (files) => {
    uploads = uploads.then(() => upload(files));
  };

  listen(chooser, "change", () => {
    queue([...chooser.files]);
    chooser.value = "";
  });
  listen(root, "dragover", (event) => {
    event.preventDefault();
    root.classList.add("over");
  });
  listen(root, "dragleave", () => root.classList.remove("over"));
  listen(root, "drop", (event) => {
    event.preventDefault();
    event.stopPropagation();
    root.classList.remove("over");
    queue([...event.dataTransfer.files]);
  });

  // ---- the kernel

  const onMessage = (message) => acknowledged(message.more);
  model.on("change:token", unlock);
  model.on("msg:custom", onMessage);
  signal.addEventListener("abort", () => {
    model.off("change:token", unlock);
    model.off("msg:custom", onMessage);
    chooser.remove();
  });

  const active = document.activeElement;
  if (!active || active === document.body || !active.closest("input, textarea, select, .cm-content")) focus();
  model.send({ press: "hello", token: model.get("token") });
  unlock();
}

export default {
  render(view) {
    const over = new AbortController();
    const wait = () => {
      if (over.signal.aborted) return;
      const root = view.el.closest(".labeller");
      if (root) begin(view, root, over.signal);
      else setTimeout(wait, 10);
    };
    wait();
    return () => over.abort();
  },
};
