// lmcache_symbol: the one symbol that LMCache 0.5.4 to 0.5.6 miss beside torch 2.11, which has this constructor inline.
//
//   g++ -std=c++17 -O2 -shared -fPIC -I"$TORCH/include" benchmarks/lmcache_symbol.cpp -L"$TORCH/lib" -lc10 -o lmcache_symbol.so
//
// where TORCH is the folder of torch. lmcache_reference loads it after torch (LMCACHE_SYMBOL) and before lmcache.

#include <new>
#include <string>
#include <utility>

#include <c10/util/Exception.h>

extern "C" void construct(void* memory, c10::SourceLocation location, std::string message)
    __asm__("_ZN3c1019NotImplementedErrorC1ENS_14SourceLocationENSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEE");

extern "C" void construct(void* memory, c10::SourceLocation location, std::string message) {
    new (memory) c10::NotImplementedError(location, std::move(message));
}
