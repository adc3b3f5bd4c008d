/** Rollouts, in PostgreSQL: the same tests as in SQLite. */

import { afterAll, setDefaultTimeout } from "bun:test";
import { Stores } from "./helpers/fleet.ts";
import { testRollouts } from "./helpers/rollout-tests.ts";

setDefaultTimeout(600_000);

const stores = await Stores.start();
afterAll(() => stores[Symbol.asyncDispose]());

testRollouts(stores, stores.postgresql);
