# The addresses in code of an ESP32, S2 or S3 (Xtensa): CALL0, 4, 8, 12, L32R, and
# words in between. See ota_fields.py.

from ota_fields import added, word


@micropython.viper
def scan(
    o: object,
    at: int,
    stop: int,
    end: int,
    size: int,
    base: int,
    shift: int,
    first: object,
    absolute: object,
    relative: object,
) -> int:
    b = ptr8(o)
    moves = ptr8(first)
    while at < stop:
        if at & 3 == 0 and moves[b[at + 3]] != 0 and at + 4 <= size:
            if int(word(o, at, absolute)) != 0:
                at += 4
                continue
        if at + 8 > end:
            return end
        kind = b[at] & 15
        n = 3
        if kind >= 8 and kind < 14:
            n = 2
        aligned = (at | 3) + 1
        if aligned < at + n:
            # What stands across an address, or the start of a function, was no
            # instruction.
            if moves[b[aligned + 3]] != 0:
                if int(word(o, aligned, absolute)) != 0:
                    at = aligned + 4
                    continue
            if b[aligned] == 0x36 and b[aligned + 1] & 15 == 1:
                at = aligned
                continue
        here = base + at
        if kind == 5:  # CALL
            old = (((b[at] >> 6 | b[at + 1] << 2 | b[at + 2] << 10) ^ 0x20000) - 0x20000) << 2
            here = (here & -4) + 4
            to = here + old
            to += int(added(relative, to >> 16, to & 0xFFFF)) - (((base + at + shift) & -4) + 4)
            if to != old and to & 3 == 0 and (to + 0x80000) >> 20 == 0:
                b[at] = b[at] & 0x3F | (to << 4) & 0xC0
                b[at + 1] = (to >> 4) & 255
                b[at + 2] = (to >> 12) & 255
        elif kind == 1:  # L32R
            old = ((b[at + 1] | b[at + 2] << 8) - 0x10000) << 2
            here = (here + 3) & -4
            to = here + old
            to += int(added(relative, to >> 16, to & 0xFFFF)) - ((base + at + shift + 3) & -4)
            if to != old and to & 3 == 0 and to < 0 and to >= -0x40000:
                b[at + 1] = (to >> 2) & 255
                b[at + 2] = (to >> 10) & 255
        at += n
    return at
