#!/bin/sh
# Runs a compiler command; keeps what `ptxas -v` reports beside the object file, as OBJECT.ptxas, and shows the rest.
object=
previous=
for argument in "$@"; do
    [ "$previous" = -o ] && object=$argument
    previous=$argument
done
log=$object.ptxas
"$@" 2>"$log"
status=$?
grep -v -E '^ptxas info|^ +[0-9]+ bytes stack frame|^ptxas info *: *Function properties' "$log" >&2
exit $status
