/** When a rollout may go on: what an operator writes, and what the clock on the wall there says. */

import { describe, expect, test } from "bun:test";
import { isOpen, OTAError, parseWindow } from "../ota.ts";

/** Whether a window is open at these moments, one letter for each: `o` or `-`. */
function openings(window: string, ...times: string[]): string {
  const read = parseWindow(window);
  return times.map((time) => (isOpen(read, Date.parse(time)) ? "o" : "-")).join("");
}

/** Why a text is no window. */
function refusal(text: string): string {
  try {
    parseWindow(text);
  } catch (error) {
    expect(error).toBeInstanceOf(OTAError);
    expect((error as OTAError).exitCode).toBe(2);
    return (error as OTAError).message;
  }
  throw new Error(`${text} was taken for a window`);
}

/** Midday of each day of a week that begins on a Monday. */
const WEEK = Array.from({ length: 7 }, (_, day) => `2026-01-${12 + day}T12:00Z`);

describe("times", () => {
  test("begin with their first minute, and end before their last", () => {
    const times = ["00:59:59.999", "01:00", "03:59:59.999", "04:00"];
    expect(openings("01:00-04:00", ...times.map((time) => `2026-01-12T${time}Z`))).toBe("-oo-");
  });

  test("are UTC, unless a zone is said", () => {
    const times = ["2026-01-12T00:30Z", "2026-01-12T01:30Z"];
    expect(openings("01:00-02:00", ...times)).toBe("-o");
    expect(openings("01:00-02:00 UTC", ...times)).toBe("-o");
    expect(openings("01:00-02:00 Europe/Berlin", ...times)).toBe("o-");
    expect(openings("01:00-02:00 europe/berlin", ...times)).toBe("o-");
  });

  test("of a whole day end at 24:00", () => {
    const times = ["2026-01-12T00:00Z", "2026-01-12T23:59:59Z", "2026-01-13T00:00Z"];
    expect(openings("Mon 00:00-24:00", ...times)).toBe("oo-");
  });

  test("may have one digit, and a dash with spaces around it", () => {
    expect(openings("Mon - Fri 1:00 – 4:00", "2026-01-12T01:00Z", "2026-01-17T01:00Z")).toBe("o-");
  });
});

describe("days", () => {
  test("are each one, unless some are said", () => {
    expect(openings("11:00-13:00", ...WEEK)).toBe("ooooooo");
  });

  test("are ranges and lists, in short or in full", () => {
    expect(openings("Mon-Fri 11:00-13:00", ...WEEK)).toBe("ooooo--");
    expect(openings("Mon,Wed,Sat-Sun 11:00-13:00", ...WEEK)).toBe("o-o--oo");
    expect(openings("Mon Wed Thursday 11:00-13:00", ...WEEK)).toBe("o-oo---");
    expect(openings("tue, THU 11:00-13:00", ...WEEK)).toBe("-o-o---");
  });

  test("may go over the end of the week", () => {
    expect(openings("Sat-Mon 11:00-13:00", ...WEEK)).toBe("o----oo");
  });

  test("are those of the zone", () => {
    // Monday evening in New York is Tuesday in UTC.
    const times = ["2026-01-13T03:00Z", "2026-01-14T03:00Z"];
    expect(openings("Mon 21:00-23:00 America/New_York", ...times)).toBe("o-");
  });
});

test("over midnight, it belongs to the day on which it begins", () => {
  const friday = ["2026-01-16T02:00Z", "2026-01-16T21:59Z", "2026-01-16T22:00Z"];
  const saturday = ["2026-01-17T03:59Z", "2026-01-17T04:00Z", "2026-01-17T23:00Z"];
  expect(openings("Fri 22:00-04:00", ...friday, ...saturday)).toBe("--oo--");
  expect(openings("Sun 22:00-00:00", "2026-01-18T23:59Z", "2026-01-19T00:00Z")).toBe("o-");
});

describe("several", () => {
  const times = ["2026-01-12T01:30Z", "2026-01-17T01:30Z", "2026-01-17T12:30Z"];

  test("are separated by a comma or a semicolon", () => {
    expect(openings("Mon-Fri 01:00-02:00, Sat 12:00-13:00", ...times)).toBe("o-o");
    expect(openings("Mon-Fri 01:00-02:00; Sat 12:00-13:00", ...times)).toBe("o-o");
    expect(openings("Mon,Tue 01:00-02:00, Thu,Sat 12:00-13:00", ...times)).toBe("o-o");
  });

  test("have a zone each, or one at the end", () => {
    const both = ["2026-01-12T00:30Z", "2026-01-17T11:30Z"];
    expect(openings("Mon 01:00-02:00, Sat 12:00-13:00 Europe/Berlin", ...both)).toBe("oo");
    expect(openings("Mon 01:00-02:00 Europe/Berlin, Sat 12:00-13:00 UTC", ...both)).toBe("o-");
  });
});

describe("when clocks are changed", () => {
  test("the same time on the wall is another one in UTC", () => {
    const times = ["2026-01-12T00:30Z", "2026-07-13T00:30Z", "2026-07-12T23:30Z"];
    expect(openings("01:00-02:00 Europe/Berlin", ...times)).toBe("o-o");
  });

  test("forward, the hour that there is not is left out", () => {
    // In Berlin, 02:00 on 29 March 2026 is 03:00.
    const times = ["2026-03-29T00:59Z", "2026-03-29T01:00Z", "2026-03-29T01:29Z"];
    expect(openings("02:30-03:30 Europe/Berlin", ...times)).toBe("-oo");
    expect(openings("02:30-03:30 Europe/Berlin", "2026-03-29T01:30Z")).toBe("-");
    expect(openings("01:00-02:00 Europe/Berlin", ...times)).toBe("o--");
    expect(openings("02:00-03:00 Europe/Berlin", ...times)).toBe("---");
  });

  test("back, the hour that comes twice counts twice", () => {
    // In Berlin, 03:00 on 25 October 2026 is 02:00.
    const times = ["2026-10-25T00:29Z", "2026-10-25T00:30Z", "2026-10-25T01:00Z"];
    expect(openings("01:00-02:30 Europe/Berlin", ...times)).toBe("o-o");
    expect(openings("02:00-03:00 Europe/Berlin", ...times, "2026-10-25T02:00Z")).toBe("ooo-");
  });

  test("over midnight, by half an hour, and in the south", () => {
    // In Sydney, clocks go forward on 4 October 2026; on Lord Howe Island by half an hour.
    const times = ["2026-10-03T15:59Z", "2026-10-03T16:00Z", "2026-10-03T16:59Z"];
    expect(openings("Sat 22:00-04:00 Australia/Sydney", ...times)).toBe("ooo");
    expect(openings("Sat 22:00-04:00 Australia/Sydney", "2026-10-03T17:00Z")).toBe("-");
    const island = ["2026-10-03T15:29Z", "2026-10-03T15:30Z", "2026-10-03T15:59Z"];
    expect(openings("02:00-03:00 Australia/Lord_Howe", ...island)).toBe("-oo");
    expect(openings("02:00-03:00 Australia/Lord_Howe", "2026-10-03T16:00Z")).toBe("-");
  });
});

describe("what is no window", () => {
  test.each([
    ["", "a time is missing"],
    ["01:00-04:00,", "a time is missing"],
    ["Mon-Fri", "days need a time"],
    ["Mon; 01:00-04:00", "days need a time"],
    ["Mon 1-4", "1-4 is neither a day nor a time"],
    ["Mon 25:00-26:00", "25:00-26:00 is neither"],
    ["Mon 01:60-02:00", "01:60-02:00 is neither"],
    ["Mon 01:00-01:00", "01:00-01:00 is neither"],
    ["Mo 01:00-02:00", "Mo is neither"],
    ["Mon-Tue-Wed 01:00-02:00", "Mon-Tue-Wed is neither"],
    ["Mon 01:00-02:00 Berlin", "Berlin is no time zone"],
    ["Mon 01:00-02:00 CEST", "CEST is no time zone"],
    ["Mon 01:00-02:00 Tue 03:00-04:00", "before Tue, a comma is missing"],
    ["Mon 01:00-02:00 UTC 03:00-04:00", "before 03:00-04:00, a comma is missing"],
    ["Mon 01:00-02:00, 03:00-04:00", "say the days of each time"],
    ["01:00-02:00 Europe/Berlin, 03:00-04:00", "say the zone once, at the end"],
    ["01:00-02:00 UTC, 03:00-04:00, 05:00-06:00 UTC", "say the zone once, at the end"],
    ["01:00-02:00,".repeat(30), "at most 256 characters"],
  ])("%s", (text, why) => {
    const message = refusal(text);
    expect(message).toContain("a window is like 'Mon-Fri 01:00-04:00 Europe/Berlin', found '");
    expect(message).toContain(why);
  });

  test("the message has no control characters", () => {
    expect(refusal("Mon \u001b[31m")).not.toContain("\u001b");
  });
});
