"""A pickle interpreter that imports and executes nothing, for EDM's snapshots, training states and CIFAR-10.

A pickle is a program for a small stack machine. Python's own can be told which globals to refuse, yet the
program alone can still crash it or exhaust its memory (a tuple nested a million deep is hashed recursively
until the C stack overflows; a memo index of 2^31 is an allocation). So the machine here is ours: the binary
opcodes and nothing else, at most `MAX_STEPS` of them, and every callable is a stand-in.
"""

import dataclasses
import struct

from dnnlib.text import excerpt

MAX_STEPS = 1_000_000  # opcodes and copied values; EDM's largest networks take about a tenth of it
SCALARS = (str, int, float, bool, type(None))


class Refused(Exception):
    """What is wrong with a pickle, as the second half of a sentence."""


def require(condition, reason):
    """Raise Refused with that reason unless the condition holds."""
    if not condition:
        raise Refused(reason)


# -- what a pickle may build

@dataclasses.dataclass(frozen=True, eq=False)
class StandIn:
    """Takes the place of a global that a pickle calls."""
    call: object


class Buildable:
    """An object whose state a program may set, through `set_state`: pickle's opcode BUILD."""


# -- the machine

class Machine:
    """Runs the pickle programs in `data`, one per `load()`, and keeps the budget they share.

    Args:
        data: Buffer with the program(s); byte strings in it become memoryviews, never copies.
        find_global: Mapping (module, name) → stand-in or constant.
        persistent_load: Function of a persistent id, where the format has them.

    Raises Refused for what is not allowed; a damaged program may raise any ordinary exception.
    """

    def __init__(self, data, find_global, persistent_load=None):
        self.data, self.pos = memoryview(data), 0
        self.find_global, self.persistent_load = find_global, persistent_load
        self.steps_left, self.bytes_left = MAX_STEPS, len(self.data)

    def take(self, n):
        """The next n bytes, in place."""
        require(n <= len(self.data) - self.pos, 'it is cut off or damaged')
        self.pos += n
        return self.data[self.pos - n:self.pos]

    def number(self, fmt):
        return struct.unpack(fmt, self.take(struct.calcsize(fmt)))[0]

    def line(self):
        end = bytes(self.data[self.pos:self.pos + 256]).find(b'\n')
        require(end >= 0, 'it is cut off or damaged')
        return str(self.take(end + 1)[:-1], 'utf-8')

    def spend(self, steps=1):
        self.steps_left -= steps
        require(self.steps_left >= 0, f'it has more than {MAX_STEPS} parts')

    def load(self):
        """Run one program up to its STOP and return the top of the stack."""
        self.stack, self.marks, self.memo = [], [], {}
        while True:
            self.spend()
            code = self.take(1)[0]
            if code == STOP:
                return self.stack.pop()
            require(code in OPCODES, f'its byte {self.pos - 1} is not an instruction that such files have')
            OPCODES[code](self)

    def push(self, value):
        self.stack.append(value)

    def pop(self, n):
        """Remove and return the top n values, as a tuple."""
        require(len(self.stack) >= n, 'it is damaged')
        values = tuple(self.stack[len(self.stack) - n:])
        del self.stack[len(self.stack) - n:]
        return values

    def pop_mark(self):
        """Remove the last mark and return all values above it."""
        values, self.stack = self.stack, self.marks.pop()
        return values

    def set_mark(self):
        self.marks.append(self.stack)
        self.stack = []

    def memoize(self, index):
        self.memo[index] = self.stack[-1]

    def push_global(self, module, name):
        known = type(module) is str and type(name) is str and (module, name) in self.find_global
        require(known, f'it names the Python global {excerpt(module)}.{excerpt(name)}, which no such file needs')
        self.push(self.find_global[module, name])

    def call(self):
        target, args = self.pop(2)
        require(isinstance(target, StandIn) and type(args) is tuple, 'it calls something that is not callable')
        self.push(target.call(*args))

    def build(self):
        state, = self.pop(1)
        require(isinstance(self.stack[-1], Buildable), 'an object in it is malformed')
        self.stack[-1].set_state(state)

    def append(self, values):
        require(type(self.stack[-1]) is list, 'it is damaged')
        self.stack[-1].extend(values)

    def set_items(self, values):
        target = self.stack[-1]
        require(type(target) is dict and len(values) % 2 == 0, 'it is damaged')
        require(all(type(k) in SCALARS for k in values[::2]), 'a key in it is not a plain value')
        target.update(zip(values[::2], values[1::2]))

    def fill_set(self, target, values):
        require(type(target) is set and type(values) in (list, tuple), 'it is damaged')
        require(all(type(v) in SCALARS for v in values), 'a member of a set in it is not a plain value')
        self.spend(len(values))
        target.update(values)
        return target

    def add_items(self):
        values = self.pop_mark()
        self.fill_set(self.stack[-1], values)

    def push_persistent(self):
        require(self.persistent_load is not None, 'it refers to data outside itself')
        self.push(self.persistent_load(*self.pop(1)))


def _text(fmt):
    # As pickle writes strings: a file name that is not UTF-8 contains surrogates.
    return lambda m: m.push(str(m.take(m.number(fmt)), 'utf-8', 'surrogatepass'))


def _bytes(fmt):
    return lambda m: m.push(m.take(m.number(fmt)))


STOP = ord('.')
OPCODES = {  # the names in pickletools.opcodes; text opcodes of protocol 0 are left out
    0x80: lambda m: m.take(1),  # PROTO
    0x95: lambda m: m.take(8),  # FRAME
    ord('N'): lambda m: m.push(None),
    0x88: lambda m: m.push(True),
    0x89: lambda m: m.push(False),
    ord('K'): lambda m: m.push(m.number('<B')),
    ord('M'): lambda m: m.push(m.number('<H')),
    ord('J'): lambda m: m.push(m.number('<i')),
    0x8a: lambda m: m.push(int.from_bytes(m.take(m.number('<B')), 'little', signed=True)),  # LONG1
    ord('G'): lambda m: m.push(m.number('>d')),
    0x8c: _text('<B'), ord('X'): _text('<I'), 0x8d: _text('<Q'),
    ord('C'): _bytes('<B'), ord('B'): _bytes('<I'), 0x8e: _bytes('<Q'), 0x96: _bytes('<Q'),
    ord('U'): _bytes('<B'), ord('T'): _bytes('<I'),  # Python 2's strings
    ord('('): Machine.set_mark,
    ord(']'): lambda m: m.push([]),
    ord('}'): lambda m: m.push({}),
    0x8f: lambda m: m.push(set()),
    ord(')'): lambda m: m.push(()),
    0x85: lambda m: m.push(m.pop(1)),
    0x86: lambda m: m.push(m.pop(2)),
    0x87: lambda m: m.push(m.pop(3)),
    ord('t'): lambda m: m.push(tuple(m.pop_mark())),
    ord('a'): lambda m: m.append(m.pop(1)),
    ord('e'): lambda m: m.append(m.pop_mark()),
    ord('s'): lambda m: m.set_items(m.pop(2)),
    ord('u'): lambda m: m.set_items(m.pop_mark()),
    0x90: Machine.add_items,
    0x94: lambda m: m.memoize(len(m.memo)),
    ord('q'): lambda m: m.memoize(m.number('<B')),
    ord('r'): lambda m: m.memoize(m.number('<I')),
    ord('h'): lambda m: m.push(m.memo[m.number('<B')]),
    ord('j'): lambda m: m.push(m.memo[m.number('<I')]),
    ord('c'): lambda m: m.push_global(m.line(), m.line()),
    0x93: lambda m: m.push_global(*m.pop(2)),
    ord('R'): Machine.call,
    0x81: Machine.call,  # NEWOBJ
    ord('b'): Machine.build,
    ord('Q'): Machine.push_persistent,
}
