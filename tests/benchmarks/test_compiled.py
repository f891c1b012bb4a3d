"""What is read off a compiled program."""

import types

from benchmarks.systems import compiled

PROGRAM = """\
%inner (x: f32[]) -> f32[] {
  %a = f32[] fusion(%x), kind=kLoop
  %b = f32[] custom-call(%a)
}

%outer (x: f32[]) -> f32[] {
  %c = f32[] fusion(%x), kind=kLoop
  %d = f32[] while(%c), condition=%e, body=%inner, backend_config={"known_trip_count":{"n":"9"}}
}

ENTRY %main (x: f32[]) -> f32[] {
  %f = f32[] fusion(%x), kind=kLoop
  %g = f32[] while(%f), condition=%h, body=%outer, backend_config={"known_trip_count":{"n":"10"}}
}
"""


def test_kernels_of_loops_within_loops_are_launched_as_often_as_both_say():
    program = types.SimpleNamespace(as_text=lambda: PROGRAM)
    assert compiled.launches(program) == 1 + 10 * (1 + 9 * 2)
