// replay.cpp - runs launches that were written down (src/device/emulated.rs) again, each in memory of exactly the size it had: for ASan, UBSan and TSan.
//
//   replay LAUNCHES [late|early]     prints how many kernels ran; a message of the runtime or a sanitizer's report ends it with a code above 0
//
// Kernels are found by name among the symbols of this program, so it is linked with -rdynamic.
#include "cuda.h"
#include <dlfcn.h>
#include <string>
#include <vector>

using Entry = const char* (*)(void* const* args);
extern "C" struct masque_emulated_launch { uint32_t grid[3], block[3], shared; int32_t early; uint64_t seed; };
extern "C" int masque_emulated_block(Entry entry, void* const* args, const masque_emulated_launch* launch, uint64_t index, char* message, size_t room);

static uint64_t word(FILE* file) {
  uint64_t w;
  if (fread(&w, 8, 1, file) != 1) { fprintf(stderr, "the file ends in the middle of a launch\n"); exit(1); }
  return w;
}

int main(int count, char** words) {
  if (count < 2) { fprintf(stderr, "usage: replay LAUNCHES [late|early]\n"); return 2; }
  FILE* file = fopen(words[1], "rb");
  char mark[16];
  if (!file || fread(mark, 16, 1, file) != 1 || memcmp(mark, "masque launches1", 16)) { fprintf(stderr, "%s holds no launches\n", words[1]); return 1; }
  const int early = count > 2 && !strcmp(words[2], "early");
  int launches = 0;
  for (int next; (next = fgetc(file)) != EOF; launches++) {
    ungetc(next, file);
    const uint64_t name_length = word(file), args = word(file);
    masque_emulated_launch launch{};
    for (auto& size : launch.grid) size = (uint32_t)word(file);
    launch.block[0] = (uint32_t)word(file);
    launch.block[1] = launch.block[2] = 1;
    launch.shared = (uint32_t)word(file);
    launch.early = early;
    std::vector<uint64_t> sizes(word(file));
    for (auto& size : sizes) size = word(file);
    std::vector<std::pair<uint64_t, uint64_t>> places(args);
    for (auto& place : places) { place.first = word(file); place.second = word(file); }
    std::string name(name_length, 0), letters(args, 0);
    bool whole = fread(name.data(), 1, name_length, file) == name_length && fread(letters.data(), 1, args, file) == args;
    std::vector<unsigned char*> memory;
    for (uint64_t size : sizes) {
      // operator new would round up; the address must be as aligned as a GPU's.
      void* p = nullptr;
      if (posix_memalign(&p, 256, size ? size : 1)) { fprintf(stderr, "no memory\n"); return 1; }
      memory.push_back((unsigned char*)p);
      whole = whole && fread(p, 1, size, file) == size;
    }
    if (!whole) { fprintf(stderr, "the file ends in the middle of a launch\n"); return 1; }
    std::vector<uint64_t> cells(args);
    std::vector<void*> list(args);
    for (uint64_t i = 0; i < args; i++) {
      const auto& [at, value] = places[i];
      cells[i] = at == ~0ull ? value : (uint64_t)(memory[at] + value);
      list[i] = &cells[i];
    }
    auto entry = (Entry)dlsym(RTLD_DEFAULT, ("masque_emulated_" + name).c_str());
    if (!entry) { fprintf(stderr, "there is no kernel %s\n", name.c_str()); return 1; }
    const uint64_t blocks = (uint64_t)launch.grid[0] * launch.grid[1] * launch.grid[2];
    for (uint64_t i = 0; i < blocks; i++) {
      char message[512] = {};
      if (masque_emulated_block(entry, list.data(), &launch, i, message, sizeof message)) { fprintf(stderr, "%s: %s\n", name.c_str(), message); return 1; }
    }
    for (auto* p : memory) free(p);
  }
  printf("%d launches\n", launches);
  return 0;
}
