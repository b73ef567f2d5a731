# Fail if the linker could replace a function by its version for another instruction set. The linker keeps one version
# of weak functions with one name. If the kept version uses AVX-512, processors without AVX-512 cannot run it. So every
# function must be local, or in the namespace of its instruction set.
#   cmake -DNM=nm -DISA=avx2 "-DOBJECTS=a.o;b.o" -P isa_symbols.cmake
foreach(OBJECT IN LISTS OBJECTS)
  execute_process(COMMAND ${NM} --demangle --defined-only --extern-only ${OBJECT}
                  OUTPUT_VARIABLE SYMBOLS COMMAND_ERROR_IS_FATAL ANY)
  string(REGEX MATCHALL "[^\n]+" SYMBOLS "${SYMBOLS}")
  list(FILTER SYMBOLS EXCLUDE REGEX "DW\\.ref\\.__gxx_personality_v0")  # a pointer, not code
  list(LENGTH SYMBOLS ALL)
  list(FILTER SYMBOLS EXCLUDE REGEX "fastkd::cpu::${ISA}::")
  if(ALL EQUAL 0 OR SYMBOLS)
    list(JOIN SYMBOLS "\n  " SYMBOLS)
    message(FATAL_ERROR "${OBJECT}: ${ALL} functions; outside fastkd::cpu::${ISA}:\n  ${SYMBOLS}")
  endif()
endforeach()
