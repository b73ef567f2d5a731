# Fail if a function is neither local nor in the namespace of its instruction set. The linker keeps one of several weak
# functions of a name, perhaps the AVX-512 function, which other processors cannot run.
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
