# The addresses in code of a Cortex-M (Thumb-2): BL, and words in between. See
# ota_fields.py.

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
        high = b[at + 1]
        n = 2
        if high >= 0xE8:
            n = 4
        aligned = (at | 3) + 1
        # What stands across an address was no instruction.
        if aligned < at + n and moves[b[aligned + 3]] != 0:
            if int(word(o, aligned, absolute)) != 0:
                at = aligned + 4
                continue
        if high & 0xF8 == 0xF0 and b[at + 3] & 0xD0 == 0xD0:  # BL
            low = b[at + 2] | b[at + 3] << 8
            sign = (high >> 2) & 1
            to = (high & 3) << 20 | b[at] << 12 | (low & 0x7FF) << 1
            to |= ((low >> 13 ^ sign) & 1 ^ 1) << 23 | ((low >> 11 ^ sign) & 1 ^ 1) << 22
            to -= sign << 24
            add = base + at + 4 + to
            add = int(added(relative, add >> 16, add & 0xFFFF)) - shift
            to += add
            if add != 0 and to & 1 == 0 and (to + 0x1000000) >> 25 == 0:
                sign = (to >> 24) & 1
                low = low & 0xD000 | (to >> 1) & 0x7FF
                low |= ((to >> 23 ^ sign) & 1 ^ 1) << 13 | ((to >> 22 ^ sign) & 1 ^ 1) << 11
                b[at] = (to >> 12) & 255
                b[at + 1] = 0xF0 | sign << 2 | (to >> 20) & 3
                b[at + 2] = low & 255
                b[at + 3] = low >> 8
        at += n
    return at
