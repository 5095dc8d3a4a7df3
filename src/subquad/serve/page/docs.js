/** Shows openapi.json as text: each endpoint, what it takes and what it answers. Everything goes in as text nodes. */

function node(tag, ...children) {
  const element = document.createElement(tag);
  element.append(...children);
  return element;
}

/** What a `$ref` stands for, and the name of it. */
function resolve(schema, api) {
  const name = schema.$ref?.split("/").pop();
  return { name, schema: name ? api.components.schemas[name] : schema };
}

/** A schema's type in a few words. */
function describe(schema, api) {
  const { name, schema: own } = resolve(schema, api);
  if (name) return name;
  const some = own.anyOf ?? own.oneOf;
  if (some) return some.map((one) => describe(one, api)).join(" or ");
  if ("const" in own) return JSON.stringify(own.const);
  if (own.enum) return own.enum.map((value) => JSON.stringify(value)).join(", ");
  if (own.type === "array") return `list of ${describe(own.items ?? {}, api)}${bounds(own)}`;
  return (own.type ?? "anything") + bounds(own);
}

function bounds(schema) {
  const words = {
    minimum: "at least", exclusiveMinimum: "above", maximum: "at most", exclusiveMaximum: "below",
    minLength: "characters at least", maxLength: "characters at most", minItems: "items at least", maxItems: "items at most",
    pattern: "matches",
  };
  const said = Object.keys(words).filter((key) => key in schema).map((key) => `${words[key]} ${exactly(schema[key])}`);
  return said.length ? ` (${said.join(", ")})` : "";
}

/** As it is, or rounded where a browser has lost its last digits. */
function exactly(value) {
  return typeof value !== "number" || Math.abs(value) <= Number.MAX_SAFE_INTEGER ? value : value.toExponential(3);
}

/** Names of schemas that one refers to, itself among them, in the order in which a reader meets them. */
function reached(schema, api, found = new Set()) {
  if (schema === null || typeof schema !== "object") return found;
  const { name } = schema.$ref ? resolve(schema, api) : {};
  if (name && !found.has(name)) {
    found.add(name);
    reached(api.components.schemas[name], api, found);
  }
  for (const value of Object.values(schema)) reached(value, api, found);
  return found;
}

function fields(schema, api) {
  const list = node("dl");
  for (const [name, field] of Object.entries(schema.properties ?? {})) {
    const needed = schema.required?.includes(name) ? ", required" : "";
    list.append(node("dt", node("code", name)), node("dd", `${describe(field, api)}${needed}`));
    if (field.description) list.append(node("dd", field.description));
  }
  return list;
}

function operation(method, path, own, api) {
  const section = node("section");
  const verb = node("span", method.toUpperCase());
  verb.className = "method";
  section.append(node("h2", node("code", verb, path)), node("p", own.description ?? own.summary ?? ""));
  const body = own.requestBody?.content?.["application/json"]?.schema;
  if (body) {
    for (const name of reached(body, api)) {
      const schema = api.components.schemas[name];
      const part = node("details", node("summary", node("code", name), ` ${schema.description ?? ""}`), fields(schema, api));
      part.open = name === resolve(body, api).name;
      section.append(part);
    }
  }
  const answers = node("dl");
  for (const [status, answer] of Object.entries(own.responses ?? {})) {
    const kinds = Object.keys(answer.content ?? {}).join(", ");
    answers.append(node("dt", node("code", status)), node("dd", `${answer.description}${kinds ? ` (${kinds})` : ""}`));
  }
  section.append(node("h3", "Answers"), answers);
  return section;
}

async function main(place) {
  try {
    const answer = await fetch("openapi.json");
    if (!answer.ok) throw new Error(`openapi.json: the server answered ${answer.status}`);
    const api = await answer.json();
    const all = Object.entries(api.paths).flatMap(([path, methods]) =>
      Object.entries(methods).map(([method, own]) => operation(method, path, own, api)));
    place.replaceChildren(...all);
  } catch (error) {
    place.replaceChildren(node("p", `The description could not be read: ${error.message}`));
  }
}

main(document.querySelector("#api"));
