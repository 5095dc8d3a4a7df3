/**
 * A model's text as elements: paragraphs, fenced code, `code` and **bold**. Text goes in as text nodes, so that nothing
 * a model writes is ever read as HTML.
 */

/** Splits at blank lines and code fences into `{ code, text }`; a fence still open runs to the end. */
export function blocks(text) {
  const found = [];
  let lines = [];
  let fence = null;
  const close = (code) => {
    if (lines.length) found.push({ code, text: lines.join("\n") });
    lines = [];
  };
  for (const line of text.split("\n")) {
    const mark = /^ {0,3}(`{3,}|~{3,})(.*)$/.exec(line);
    if (fence !== null) {
      if (mark && mark[1].startsWith(fence) && !mark[2].trim()) {
        close(true);
        fence = null;
      } else {
        lines.push(line);
      }
    } else if (mark) {
      close(false);
      fence = mark[1];
    } else if (line.trim() === "") {
      close(false);
    } else {
      lines.push(line);
    }
  }
  close(fence !== null);
  return found;
}

/** Makes `element` show `text`. Blocks already shown stay as they are: a growing text costs its last block only. */
export function show(element, text) {
  const wanted = blocks(text);
  while (element.children.length > wanted.length) element.lastChild.remove();
  wanted.forEach((block, i) => {
    const old = element.children[i];
    if (old && old.block.code === block.code && old.block.text === block.text) return;
    const fresh = block.code ? codeBlock(block.text) : paragraph(block.text);
    fresh.block = block;
    if (old) old.replaceWith(fresh);
    else element.append(fresh);
  });
}

function codeBlock(text) {
  const pre = document.createElement("pre");
  // Wide code scrolls inside its box, by keyboard too.
  pre.tabIndex = 0;
  pre.append(leaf("code", text));
  return pre;
}

function paragraph(text) {
  const p = document.createElement("p");
  for (const part of text.split(/(`[^`\n]+`|\*\*[^*\n]+\*\*)/)) {
    if (/^`.+`$/.test(part)) p.append(leaf("code", part.slice(1, -1)));
    else if (/^\*\*.+\*\*$/.test(part)) p.append(leaf("strong", part.slice(2, -2)));
    else p.append(part);
  }
  return p;
}

function leaf(tag, text) {
  const element = document.createElement(tag);
  element.textContent = text;
  return element;
}
