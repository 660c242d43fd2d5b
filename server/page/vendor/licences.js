// Writes assets/vendor.txt: name, version and licence of every package inside assets/vendor.js.
import { readFileSync, readdirSync, writeFileSync } from "node:fs";

const lock = JSON.parse(readFileSync("package-lock.json", "utf8"));
const bundled = Object.entries(lock.packages).filter(([path, facts]) => path && !facts.dev && !facts.optional);
const parts = bundled.map(([path, facts]) => {
  const name = path.replace(/^.*node_modules\//, "");
  const file = readdirSync(path).find((each) => /^licen[cs]e/i.test(each));
  const text = file ? readFileSync(`${path}/${file}`, "utf8").trim() : facts.license;
  return `${name} ${facts.version}\n\n${text.replace(/[^\S\n]+$/gm, "")}\n`;
});
writeFileSync("../assets/vendor.txt", parts.join(`\n${"-".repeat(72)}\n\n`));
