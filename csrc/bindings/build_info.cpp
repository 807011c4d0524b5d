// What this binary was built for, so that bnext._toolchain.read_info can read it from the file's
// bytes before anything is loaded. BNEXT_BUILD_INFO is a comma-separated list of key:value.

#define BNEXT_STRING_OF(...) #__VA_ARGS__
#define BNEXT_STRING(...) BNEXT_STRING_OF(__VA_ARGS__)

extern "C" __attribute__((used)) const char bnext_build_info[] = "bnext-build{" BNEXT_STRING(BNEXT_BUILD_INFO) "}";
