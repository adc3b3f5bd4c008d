# The part of the updater that recovers: it finishes or undoes an update that a
# reset cut short, and takes back a release that nobody confirmed. boot.py calls
# boot() at every start; OTA.py uses the rest. An update never replaces this file.
#
# Everything is in the directory .ota of the file system that is updated:
#
#   .ota/state     what is going on, "key=value" lines and a last line "end"
#   .ota/a, .ota/b an update each: the one that came last, and the next one
#   .ota/a/plan    its steps, a line each: what TAB path TAB base, and "end"
#
# A step is D (delete), A (add) or R (replace). base + ".n" is the new content
# and base + ".o" the old one. A step only renames, so each file's place tells
# whether the step was done: apply() and undo() can be repeated from anywhere.
#
# phase    meaning                             what boot() does
# -        nothing is going on                 nothing
# apply    the plan is being applied           applies all of it
# trial    applied, waits for confirm()        counts; the 4th start goes back
# undo     the plan is being undone            undoes all of it
# settle   undone, other firmware must start   starts that
#
# When boot() cannot do that (the SD card is out, the flash fails), it says so at
# every start, and the next start tries again; until then nothing is confirmed.

try:
    import uos as os
except ImportError:
    import os

FORMAT = 1  # of the files in .ota; OTA.py checks it
STARTS = 3  # that a release may use up without a confirm()


def kind(path):
    """0: nothing there, 1: a file, 2: a directory."""
    try:
        return 2 if os.stat(path)[0] & 0x4000 else 1
    except OSError:
        return 0


HOME = "/flash" if kind("/flash") else ""  # where /flash of a release goes
CARD = "/sd"
STATE = HOME + "/.ota/state"
VERSION_FILE = HOME + "/OTA_VERSION.py"

ran = False  # OTA.py updates nothing on a board whose boot.py does not call boot()
failure = ""  # why two releases may be mixed now, for an application to ask


def alive():
    """Called at every step: OTA.py puts the application's own in its place."""


def store(path, part):
    """The directory for what belongs to path: on the same file system."""
    home = CARD if path.startswith(CARD + "/") else HOME
    return home + "/.ota/" + part


def parent(path):
    return path[: path.rfind("/")]


def makedirs(path):
    """Makes the directories that path needs."""
    at = path.find("/", 1)
    while at > 0:
        if not kind(path[:at]):
            os.mkdir(path[:at])
        at = path.find("/", at + 1)


def prune(path):
    """Removes the directories above path that are empty now."""
    path = parent(path)
    while path not in ("", HOME, CARD):
        # A release may have a file where the one before has a directory.
        if kind(path) == 2:
            if os.listdir(path):
                return
            os.rmdir(path)
        path = parent(path)


def move(old, new):
    try:
        os.rename(old, new)
    except OSError:
        # Some FAT drivers do not rename over a file.
        if kind(old) != 1 or kind(new) != 1:
            raise
        os.remove(new)
        os.rename(old, new)


def sync():
    if hasattr(os, "sync"):
        os.sync()


def _read(path):
    try:
        state = {}
        with open(path) as f:
            for line in f:
                line = line.strip()
                if line == "end":
                    return state
                at = line.find("=")
                state[line[:at]] = line[at + 1 :]
    except (OSError, ValueError):
        pass
    return None


def load():
    state = _read(STATE)
    if state is None:
        state = _read(STATE + ".new")
        if state is None:
            if kind(STATE):
                print("OTA: %s cannot be read: an update may have been cut short" % STATE)
            return {}
        move(STATE + ".new", STATE)
    return state


def save(state):
    makedirs(STATE)
    with open(STATE + ".new", "w") as f:
        f.write("".join(["%s=%s\n" % (k, state[k]) for k in state if state[k]]) + "end\n")
    sync()
    move(STATE + ".new", STATE)
    sync()


def version():
    """The release on this board, "" if that is not known."""
    try:
        with open(VERSION_FILE) as f:
            parts = f.read(200).replace('"', "'").split("'")
    except OSError:
        return ""
    return parts[1] if len(parts) > 2 else ""


def plan(state):
    return store(HOME + "/", state["set"]) + "/plan"


def steps(state, what):
    with open(plan(state)) as f:
        for line in f:
            if line == "end\n":
                return
            if line[0] in what:
                alive()
                step = line[:-1].split("\t")
                if not kind(parent(step[2])):
                    raise OSError(parent(step[2]) + " is not there: is the card in?")
                yield step
    raise OSError("the plan of the update is cut short")


def apply(state):
    for _, path, base in steps(state, "D"):
        if not kind(base + ".o") and kind(path) == 1:
            os.rename(path, base + ".o")
        prune(path)
    for what, path, base in steps(state, "AR"):
        if kind(base + ".n"):
            if what == "R" and not kind(base + ".o"):
                os.rename(path, base + ".o")
            makedirs(path)
            move(base + ".n", path)
        elif kind(path) != 1:
            raise OSError(path + " is lost")
    sync()


def undo(state):
    for what, path, base in steps(state, "AR"):
        if what == "R":
            if kind(base + ".o"):
                if kind(path):
                    move(path, base + ".n")
                os.rename(base + ".o", path)
        else:
            if not kind(base + ".n") and kind(path) == 1:
                os.rename(path, base + ".n")
            prune(path)
    for _, path, base in steps(state, "D"):
        if kind(base + ".o"):
            makedirs(path)
            os.rename(base + ".o", path)
    sync()


def sweep(keep):
    """Removes what no longer belongs to an update; keep(part, name) says what does."""
    for home in (HOME, CARD):
        for part in "ab":
            path = home + "/.ota/" + part
            if kind(path):
                for name in os.listdir(path):
                    alive()
                    if not keep(part, name):
                        os.remove(path + "/" + name)


# Firmware. The ESP32 and Pycom's boards have two slots; slot() names the one
# that runs, and switch() sets the one that starts next.


def slot():
    try:
        from esp32 import Partition

        return Partition(Partition.RUNNING).info()[4]
    except ImportError:
        pass
    try:
        import pycom

        return pycom.bootmgr()[0]
    except (ImportError, AttributeError):
        return None


def switch(name):
    try:
        from esp32 import Partition
    except ImportError:
        import pycom

        if not hasattr(pycom, "bootmgr"):
            raise OSError("this firmware cannot choose what starts next")
        first = name.lower() == "factory"
        pycom.bootmgr(boot_partition=pycom.FACTORY if first else pycom.OTA_0)
        return
    Partition(name).set_boot()


def mark_valid():
    """Tells the ESP32's bootloader to stay with the firmware that runs."""
    try:
        from esp32 import Partition

        Partition.mark_app_valid_cancel_rollback()
    except (ImportError, AttributeError, OSError):
        pass  # not an ESP32, or a build without this


def reset():
    import machine

    machine.reset()


def install(state, switch=switch):
    """
    Carries out the update that state describes, then puts it on trial. After an
    OSError it is undone, or failure says why that failed, too.
    """
    try:
        apply(state)
        state["phase"] = "trial"
        state["starts"] = "0"
        save(state)
        if state.get("slot"):
            alive()
            switch(state["slot"])
    except OSError as e:
        back(state, e)
        raise


def back(state, why):
    """Undoes the update: the release before it is there again, and its firmware."""
    global failure
    failure = "%s is not yet taken back" % state.get("version")
    print("OTA: %s is taken back: %s" % (state.get("version"), why))
    state["phase"] = "undo"
    try:
        save(state)
    except OSError as e:
        print("OTA:", e)  # a full disk: undoing needs no room
    undo(state)
    after = {
        "failed": state.get("version"),
        "mark": state.get("mark"),
        "firmware": state.get("firmware_before"),
    }
    if state.get("slot") and slot() == state["slot"]:
        after["phase"] = "settle"
        after["slot"] = state["slot_before"]
    save(after)
    failure = ""
    try:
        sweep(lambda part, name: False)
    except OSError as e:
        print("OTA:", e)  # the next update sweeps, too
    if "phase" in after:
        settle(after)


def settle(state):
    """Starts the firmware that belongs to the files, again and again."""
    if slot() == state["slot"]:
        mark_valid()
        save({k: state[k] for k in state if k in ("failed", "mark", "firmware")})
        return
    starts = int(state.get("starts", "0")) + 1
    state["starts"] = str(starts)
    save(state)
    switch(state["slot"])
    if starts > STARTS:
        # No more resets of its own: at least the application runs.
        raise OSError("the firmware in %s does not start" % state["slot"])
    reset()


def trial(state):
    """Counts a start of a release that is on trial, or takes it back."""
    starts = int(state.get("starts", "0")) + 1
    new = state.get("slot")
    # Either the switch to the new firmware was cut short, or the bootloader did
    # not stay with it.
    other = new and slot() not in (None, new)
    if started_back(state):
        why = "going on"
    elif other and (state.get("seen") or starts > 1):
        why = "its firmware did not stay"
    elif starts > STARTS:
        why = "not confirmed in %d starts" % STARTS
    else:
        state["starts"] = str(starts)
        state["seen"] = "" if other else "yes"
        try:
            save(state)
            if other:
                switch(new)
                reset()
            return
        except OSError as e:
            why = e  # what cannot be counted would stay for ever
    back(state, why)


def started_back(state):
    """Was the update undone in part, on a disk too full to record that?"""
    for step in steps(state, "AR"):
        if kind(step[2] + ".n"):
            return True
    return False


def recover(state):
    phase = state.get("phase")
    if phase == "apply":
        try:
            install(state)
        except OSError:
            if failure:
                raise
            return
        if not state.get("slot"):
            return trial(state)
        reset()
    elif phase == "trial":
        trial(state)
    elif phase == "undo":
        back(state, "going on")
    elif phase == "settle":
        settle(state)


def boot():
    global ran, failure
    ran = True
    try:
        recover(load())
    except Exception as e:
        failure = str(e) or repr(e)
        print("OTA: two releases may be mixed, the next start tries again:", failure)
