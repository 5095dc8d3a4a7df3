/**
 * What the browser keeps. Storage may be forbidden or full; the page then works all the same and forgets at the end.
 */

function store(area, name) {
  let kept = null;
  return {
    read() {
      try {
        return globalThis[area].getItem(name) ?? kept;
      } catch {
        return kept;
      }
    },
    write(value) {
      kept = value;
      try {
        if (value === null) globalThis[area].removeItem(name);
        else globalThis[area].setItem(name, value);
      } catch {
        // Kept in memory above.
      }
    },
  };
}

/** The API key: for this tab only. */
export const keyStore = store("sessionStorage", "subquad.key");

const settings = store("localStorage", "subquad.settings");

/** The settings as an object of strings and booleans; empty where none were kept or they cannot be read. */
export function readSettings() {
  try {
    return { ...JSON.parse(settings.read()) };
  } catch {
    return {};
  }
}

/** Keeps `changes` beside the settings kept before. */
export function keepSettings(changes) {
  settings.write(JSON.stringify({ ...readSettings(), ...changes }));
}
