/** How ota.ts is laid out: its contents name its parts and sections, in their order. */

import { expect, test } from "bun:test";
import { resolve } from "node:path";
import { OTA_TS } from "./helpers/tool.ts";

const source = await Bun.file(OTA_TS).text();

/** A part: its number and name, and the names of its sections. */
interface Part {
  name: string;
  sections: string[];
}

/** As the contents at the top list them. */
function listed(): Part[] {
  const [, contents] = /^\/\/ Contents\n\/\/\n((?:\/\/.*\n)+)/m.exec(source) ?? [];
  const parts: Part[] = [];
  for (const line of contents!.trimEnd().split("\n")) {
    const [, number, name] = /^\/\/ ([IVX]+) +(\S.*?): \S.*\.$/.exec(line) ?? [];
    if (number) parts.push({ name: `${number} ${name}`, sections: [] });
    else parts.at(-1)!.sections.push(...line.replace(/^\/\/ +/, "").split(" · "));
  }
  return parts;
}

/** As its banners have them; each of these is followed by a comment. */
function built(): Part[] {
  const parts: Part[] = [];
  for (const [, rule, name] of source.matchAll(/^\/\/ (═{4}|─{4}) (.+?) [═─]{4,}\n\/\/ \S/gm)) {
    if (rule!.startsWith("═")) parts.push({ name: name!, sections: [] });
    else parts.at(-1)!.sections.push(name!);
  }
  return parts;
}

test("the contents are those of the file", () => {
  expect(listed()).toEqual(built());
  expect(built().length).toBeGreaterThan(5);
});

test("the README lists the parts", async () => {
  const readme = await Bun.file(resolve(import.meta.dir, "../README.md")).text();
  const listed = [...readme.matchAll(/^\| ([IVX]+ [A-Z][a-z ]+?) +\|/gm)].map(([, name]) => name);
  expect(listed).toEqual(built().map(({ name }) => name));
});

test("the contents fit 100 columns", () => {
  const [contents] = /^\/\/ Contents\n(?:\/\/.*\n)+/m.exec(source) ?? [];
  const wide = contents!.split("\n").filter((line) => line.length > 100);
  expect(wide).toEqual([]);
});

test("every part and every section opens with a comment", () => {
  const banners = source.match(/^\/\/ [═─]{4} .*$/gm) ?? [];
  expect(built().flatMap(({ name, sections }) => [name, ...sections])).toHaveLength(banners.length);
});

test("a section has at most 250 lines", () => {
  const sections = source.split(/^\/\/ [═─]{4} /m).slice(1);
  const long = sections
    .map((text) => ({ name: text.slice(0, text.indexOf(" ─")), lines: text.split("\n").length }))
    .filter(({ lines }) => lines > 250);
  expect(long).toEqual([]);
});

test("a function fits a screen: at most 60 lines", () => {
  const lines = source.split("\n");
  const declared =
    /^( *)(?:export |abstract |static |override |protected |private |async |get )*(?:function\*? \w+|\*?[#\w]+)(?:<.*>)?\(/;
  const long: string[] = [];
  let functions = 0;
  for (const [i, line] of lines.entries()) {
    const [, indent] = declared.exec(line) ?? [];
    if (
      indent === undefined ||
      indent.length > 2 ||
      /^ *(if|for|while|switch|return)\b/.test(line)
    ) {
      continue;
    }
    const isEnd = (text: string) => text.startsWith(`${indent}}`) || text === `${indent});`;
    const end = lines.findIndex((text, at) => at >= i && isEnd(text));
    const isOneLiner = / \{.*\}$|;$/.test(line);
    if (isOneLiner || end < 0) continue;
    functions++;
    if (end - i + 1 > 60) long.push(`${line.trim()} has ${end - i + 1} lines`);
  }
  expect(long).toEqual([]);
  expect(functions).toBeGreaterThan(300);
});
