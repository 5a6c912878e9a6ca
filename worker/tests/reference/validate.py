"""Judges JSON texts by their schemas: reads [{"name", "schema", "output"}] and prints what does not hold.

jsonschema 4.26.0 with every format that the schemas use asserted, not only noted, and multiples taken exactly: its own quotient of
floats holds that 1.12 is no multiple of 0.01.
"""

import json
import sys
from fractions import Fraction

import jsonschema

checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
FORMATS = ["date", "time", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"]
missing = [f for f in FORMATS if f not in checker.checkers]
if missing:
    sys.exit(f"this Python cannot check the formats {', '.join(missing)}: run ops/setup tests")



def multiple_of(validator, step, value, schema):
    if validator.is_type(value, "number") and Fraction(repr(value)) % Fraction(repr(step)) != 0:
        yield jsonschema.ValidationError(f"{value!r} is not a multiple of {step!r}")


cases = json.load(sys.stdin)
wrong = 0
for case in cases:
    validator = jsonschema.validators.validator_for(case["schema"], jsonschema.Draft202012Validator)
    validator.check_schema(case["schema"])
    validator = jsonschema.validators.extend(validator, {"multipleOf": multiple_of})
    try:
        value = json.loads(case["output"])
        errors = [e.message for e in validator(case["schema"], format_checker=checker).iter_errors(value)]
    except json.JSONDecodeError as e:
        errors = [str(e)]
    if errors:
        wrong += 1
        print(f"{case['name']}: {case['output'][:300]}\n    {errors[0][:300]}")
print(f"{len(cases) - wrong} of {len(cases)} outputs are valid")
sys.exit(1 if wrong or not cases else 0)
