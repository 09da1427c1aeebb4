// TeX in, HTML out, by KaTeX: reads [[tex, isDisplay], ...] as JSON and writes [html, ...].
// A formula that KaTeX does not take, or takes with a warning, is named, and nothing is written.
const katex = require("katex");

const formulas = JSON.parse(require("fs").readFileSync(0, "utf8"));
const bad = [];
const set = formulas.map(([tex, displayMode]) => {
  try {
    return katex.renderToString(tex, { displayMode, throwOnError: true, strict: "error" });
  } catch (error) {
    bad.push(`${tex}\n  ${error.message}`);
  }
});
if (bad.length) {
  console.error(bad.join("\n"));
  process.exit(1);
}
process.stdout.write(JSON.stringify(set));
