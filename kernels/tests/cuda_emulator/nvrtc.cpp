// An NVRTC that compiles kernels for the CPU with g++. See README.md.
// It rewrites what no C++ compiler takes (inline PTX, `extern __shared__`, thread indices), keeps
// the result next to the library, and gives the library's path as the "PTX".
#include <dlfcn.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <regex>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using std::string;

struct Program { string source, ptx, log; };
// Where each piece of shared memory starts, in the order of their numbers.
using Offsets = std::vector<unsigned>;

// Flags must be those that build.sh precompiles device.h with.
const char *const FLAGS = EMULATOR_FLAGS;

string own_directory() {
    Dl_info info;
    dladdr(reinterpret_cast<void *>(own_directory), &info);
    string path = info.dli_fname;
    return path.substr(0, path.rfind('/'));
}

string setting(const char *name, const string &fallback) {
    const char *text = getenv(name);
    return text && *text ? text : fallback;
}

string read_file(const string &path) {
    std::ifstream in(path);
    std::stringstream out;
    out << in.rdbuf();
    return out.str();
}

string hash(const string &text) {
    // Two FNV-1a hashes with different starts.
    uint64_t a = 14695981039346656037ull, b = 0x9E3779B97F4A7C15ull;
    for (unsigned char c : text) { a = (a ^ c) * 1099511628211ull; b = (b ^ c) * 1099511628211ull; }
    char out[40];
    snprintf(out, sizeof out, "%016lx%016lx", a, b);
    return out;
}

// ---------------------------------------------------------------- the same kernel as the same text

// CubeCL numbers temporaries across all kernels of a process; here they start at 0.
string renumber_temporaries(const string &source) {
    static const char PREFIX[] = "_tmp_";
    std::map<string, size_t> numbers;
    string out;
    for (size_t i = 0; i < source.size();) {
        size_t next = source.find(PREFIX, i);
        if (next == string::npos) next = source.size();
        out.append(source, i, next - i);
        i = next;
        if (i == source.size()) break;
        size_t digits = i + strlen(PREFIX), end = digits;
        while (end < source.size() && isdigit(source[end])) end++;
        auto number = numbers.emplace(source.substr(digits, end - digits), numbers.size()).first->second;
        out += PREFIX + std::to_string(number);
        i = end;
    }
    return out;
}

// CubeCL defines its vector structs in random order. They depend on built-in types only.
string sort_structs(const string &source) {
    static const string MARK = "struct __align__";
    size_t first = source.find(MARK);
    if (first == string::npos) return source;
    std::vector<string> structs;
    size_t at = first;
    while (source.compare(at, MARK.size(), MARK) == 0) {
        size_t end = source.find("};", at);
        if (end == string::npos) return source;
        structs.push_back(source.substr(at, end + 2 - at));
        at = end + 2;
        while (at < source.size() && isspace(source[at])) at++;
    }
    std::sort(structs.begin(), structs.end());
    string out = source.substr(0, first);
    for (auto &s : structs) out += s + "\n";
    return out + source.substr(at);
}

std::vector<string> lines_of(const string &source) {
    std::stringstream in(source);
    std::vector<string> lines;
    for (string line; std::getline(in, line);) lines.push_back(line);
    return lines;
}

// CubeCL declares variables in random order.
bool declares(const string &line) {
    static const std::regex DECLARATION(R"(\w+ l_mut_\d+;)");
    return line.size() < 80 && line.find(" l_mut_") != string::npos && std::regex_match(line, DECLARATION);
}
void sort_declarations(std::vector<string> &lines) {
    for (auto at = lines.begin(); at != lines.end(); ++at) {
        auto first = at;
        while (at != lines.end() && declares(*at)) ++at;
        std::sort(first, at);
        if (at == lines.end()) return;
    }
}

// CubeCL lays shared memory out in random order. The pieces get the order of their numbers, and
// their offsets become data that the driver reads when it loads the kernel.
void extract_offsets(std::vector<string> &lines, Offsets &offsets) {
    static const string NAME = "shared_memory_", BLOCK = "dynamic_shared_mem[";
    struct Piece { string comment, before, after; unsigned offset; };
    std::map<unsigned long, Piece> pieces;
    auto place = lines.end();
    for (auto at = lines.begin(); at != lines.end(); ++at) {
        size_t block = at->find(BLOCK), name = at->find(NAME);
        // The declaration of the block itself has no size.
        if (block == string::npos || name > block) continue;
        size_t digits = block + BLOCK.size(), end = at->find(']', digits);
        pieces[std::stoul(at->substr(name + NAME.size()))] = {at[-1], at->substr(0, digits), at->substr(end), unsigned(std::stoul(at->substr(digits)))};
        if (place == lines.end()) place = at - 1;
        *at = at[-1] = "";
    }
    for (auto &[number, p] : pieces) {
        *place++ = p.comment;
        *place++ = p.before + "__emu_self.offsets[" + std::to_string(offsets.size()) + "]" + p.after;
        offsets.push_back(p.offset);
    }
}

// The same text for the same kernel: what differs from run to run is gone.
string normalize(const string &source, Offsets &offsets) {
    auto lines = lines_of(sort_structs(renumber_temporaries(source)));
    sort_declarations(lines);
    extract_offsets(lines, offsets);
    string out;
    for (auto &line : lines) out += line + "\n";
    return out;
}

// ---------------------------------------------------------------- inline assembly

struct Assembly { string code; std::vector<string> outputs, inputs; };

// The end of a string literal, or of a bracketed expression, that starts at `i`.
size_t skip(const string &s, size_t i) {
    if (s[i] == '"') {
        for (i++; s[i] != '"'; i++) if (s[i] == '\\') i++;
        return i + 1;
    }
    char close = s[i] == '(' ? ')' : s[i] == '[' ? ']' : '}';
    for (i++; s[i] != close;) {
        if (i >= s.size()) throw std::runtime_error("unbalanced brackets in inline assembly");
        i = strchr("\"([{", s[i]) ? skip(s, i) : i + 1;
    }
    return i + 1;
}

// Splits at a character outside of strings and brackets.
std::vector<string> split(const string &s, char at) {
    std::vector<string> parts(1);
    for (size_t i = 0; i < s.size();) {
        if (s[i] == at) { parts.emplace_back(); i++; continue; }
        size_t end = strchr("\"([{", s[i]) ? skip(s, i) : i + 1;
        parts.back().append(s, i, end - i);
        i = end;
    }
    return parts;
}

// "=r"(expression), ... to the expressions.
std::vector<string> operands(const string &list) {
    std::vector<string> out;
    for (auto &part : split(list, ',')) {
        size_t quote = part.find('"');
        if (quote == string::npos) continue;
        out.push_back(part.substr(skip(part, quote)));
    }
    return out;
}

string literals(const string &s) {
    string out;
    for (size_t i = 0; i < s.size(); i++) {
        if (s[i] != '"') continue;
        size_t end = skip(s, i);
        out.append(s, i + 1, end - i - 2);
        i = end - 1;
    }
    return out;
}

string join(const std::vector<string> &parts, const string &before = "", const string &after = "") {
    string out;
    for (auto &p : parts) out += (out.empty() ? "" : ", ") + before + p + after;
    return out;
}

// A call with arrays of 32-bit registers.
string register_call(const string &function, const Assembly &a) {
    return "({ unsigned *__emu_out[] = {" + join(a.outputs, "__emu::word(", ")") + (a.outputs.empty() ? "nullptr" : "") +
           "}; const unsigned __emu_in[] = {" + join(a.inputs, "__emu::bits(", ")") + "}; " + function + "__emu_out, __emu_in); })";
}

string translate(const Assembly &a) {
    static const std::regex MMA(R"(mma\.sync\.aligned\.m16n8k(\d+)\.row\.col(?:\.kind::f8f6f4)?\.(\w+)\.(\w+)\.(\w+)\.(\w+)[\s\S]*)"),
        MATRIX(R"((ld|st)matrix\.sync\.aligned\.m8n8\.x(\d)(\.trans)?\.shared(?:::cta)?\.b16[\s\S]*)"),
        COPY(R"(cp\.async\.c[ag]\.shared(?:::cta)?\.global[\s\S]*)"),
        ARRIVE(R"(cp\.async\.mbarrier\.arrive\.(noinc\.)?shared(?:::cta)?\.b64[\s\S]*)"),
        WAIT(R"(cp\.async\.wait_group\s+(\d+)[\s\S]*)"),
        SATURATED(R"((add|sub)\.sat\.s32[\s\S]*)");
    std::smatch m;
    const string &c = a.code;
    if (std::regex_match(c, m, MMA))
        return register_call("__emu::mma(__emu::Type::" + m.str(2) + ", __emu::Type::" + m.str(3) + ", __emu::Type::" + m.str(4) + ", " + m.str(1) + ", ", a);
    if (std::regex_match(c, m, MATRIX))
        return register_call("__emu::" + m.str(1) + "matrix(" + m.str(2) + ", " + (m.length(3) ? "true" : "false") + ", ", a);
    if (std::regex_match(c, m, COPY)) return "__emu::cp_async(" + join(a.inputs) + ")";
    if (std::regex_match(c, m, ARRIVE))
        return "__emu_api->cp_async_arrive(__emu::shared_pointer(" + join(a.inputs) + "), " + (m.length(1) ? "true" : "false") + ")";
    if (c.find("cp.async.commit_group") == 0) return "__emu_api->cp_async_commit()";
    if (c.find("cp.async.wait_all") == 0) return "(__emu_api->cp_async_commit(), __emu_api->cp_async_wait(0))";
    if (std::regex_match(c, m, WAIT)) return "__emu_api->cp_async_wait(" + m.str(1) + ")";
    if (std::regex_match(c, m, SATURATED)) return a.outputs.at(0) + " = __emu::" + m.str(1) + "_saturated(" + join(a.inputs) + ")";
    if (c.find("elect.sync") != string::npos) return a.outputs.at(0) + " = __emu::elect()";
    return "__emu_api->fail(\"inline assembly that the emulator does not know: " + c + "\")";
}

string replace_assembly(const string &source) {
    static const std::regex START(R"(\basm\s*(?:volatile\s*)?\()");
    string out;
    auto at = source.cbegin();
    std::smatch m;
    while (std::regex_search(at, source.cend(), m, START)) {
        out.append(at, m[0].first);
        size_t open = size_t(m[0].second - source.cbegin()) - 1, end = skip(source, open);
        auto parts = split(source.substr(open + 1, end - open - 2), ':');
        parts.resize(std::max<size_t>(parts.size(), 3));
        out += translate({literals(parts[0]), operands(parts[1]), operands(parts[2])});
        at = source.cbegin() + long(end);
    }
    return out.append(at, source.cend());
}

// ---------------------------------------------------------------- the rest of the source

const char *const KERNEL_START = R"( const __emu::Thread &__emu_self = *__emu_api->self(); int &__emu_line = const_cast<int &>(__emu_self.line);
 const uint3 threadIdx = __emu::bit_cast<uint3>(__emu_self.thread_idx), blockIdx = __emu::bit_cast<uint3>(__emu_self.block_idx);
 const uint3 blockDim = __emu::bit_cast<uint3>(__emu_self.block_dim), gridDim = __emu::bit_cast<uint3>(__emu_self.grid_dim);
)";

// Thread indices become locals of each kernel; the driver starts it by `__emu_launch_<name>`.
string wrap_kernels(string source) {
    static const std::regex KERNEL(R"(__global__\s+void\s*(?:__launch_bounds__\s*\([^)]*\))?\s*(?:__cluster_dims__\s*\([^)]*\))?\s*(\w+)\s*\()");
    string ending;
    std::smatch m;
    for (size_t from = 0; std::regex_search(source.cbegin() + long(from), source.cend(), m, KERNEL);) {
        const string name = m.str(1), start = "extern \"C\" __attribute__((visibility(\"default\"))) void __emu_";
        ending += start + "launch_" + name + "(void **p) { __emu::launch(&" + name + ", p); }\n";
        ending += start + "sizes_" + name + "(void (*each)(void *, size_t), void *to) { __emu::sizes(&" + name + ", each, to); }\n";
        from = source.find('{', size_t(m[0].second - source.cbegin())) + 1;
        source.insert(from, KERNEL_START);
    }
    return source + "\n" + ending;
}

// Some kernels of CubeCL's libraries pass data between lanes through shared memory without a
// warp sync; they depend on warps in step. For those, stores keep the lanes together.
bool depends_on_step(const string &source) {
    static const std::regex NAMES(setting("TERRARIUM_EMULATOR_LOCKSTEP", "matmul_entry.*")), KERNEL(R"(__launch_bounds__\s*\(\d+\)\s*(\w+)\s*\()");
    std::smatch m;
    return std::regex_search(source, m, KERNEL) && std::regex_match(m.str(1), NAMES);
}
bool stores_in_shared(const string &line) {
    static const std::regex STORE(R"((_tmp_|shared_memory_)\d+\[.*)");
    return (line[0] == '_' || line[0] == 's') && std::regex_match(line, STORE);
}

string rewrite(string source) {
    static const std::regex INCLUDE(R"(#include\s*<(cuda|mma|cooperative_groups|nv/)[^>\n]*>)"),
        SHARED(R"(extern\s+__shared__\s*(?:__align__\s*\(\d+\)|alignas\s*\(\d+\))?\s*([\w ]+?)\s+(\w+)\s*\[\s*\]\s*;)"),
        MATRIX(R"(^(\s*)(__(?:mma|ldmatrix|stmatrix)_m)(\d+n8\w*\())", std::regex::multiline),
        WMMA(R"(nvcuda::wmma::(load_matrix_sync|store_matrix_sync|mma_sync)\()");
    source = std::regex_replace(source, INCLUDE, "");
    source = std::regex_replace(source, SHARED, "$1 *$2 = ($1 *)__emu_self.shared;");
    source = replace_assembly(source);
    source = wrap_kernels(source);
    // Calls in a kernel note their line for reports; declarations of the same names take references.
    source = std::regex_replace(source, MATRIX, "$1__EMU_CALL_$2$3");
    bool in_step = depends_on_step(source), storing = false;
    string out;
    for (string line : lines_of(source)) {
        if (in_step && !storing && stores_in_shared(line)) {
            line = "__emu_api->keep_in_step(); " + line;
            storing = true;
        }
        // A statement may have several lines.
        if (storing && !line.empty() && line.back() == ';') {
            line += " __emu_api->keep_in_step();";
            storing = false;
        }
        size_t call = line.find("__EMU_CALL_");
        if (call != string::npos) line.replace(call, 11, line.find("&reg_") == string::npos ? "__EMU_AT; " : "");
        if (line.find("wmma::") != string::npos) line = std::regex_replace(line, WMMA, "__EMU_AT; $&");
        out += line + "\n";
    }
    return "const __emu::Api *__emu_api;\n" + out;
}

// ---------------------------------------------------------------- compilation

string run(const string &command, int &status) {
    FILE *pipe = popen((command + " 2>&1").c_str(), "r");
    if (!pipe) throw std::runtime_error("cannot start the compiler");
    string out;
    char buffer[4096];
    while (size_t n = fread(buffer, 1, sizeof buffer, pipe)) out.append(buffer, n);
    status = pclose(pipe);
    return out;
}

void make_directory(const string &path) {
    for (size_t i = 1; i <= path.size(); i++)
        if (i == path.size() || path[i] == '/') mkdir(path.substr(0, i).c_str(), 0777);
}

// Leaves the CUDA C++ for other compilers, once for each kernel.
void keep(const string &source, const string &name) {
    string folder = setting("TERRARIUM_EMULATOR_SOURCES", "");
    if (folder.empty()) return;
    make_directory(folder);
    string base = folder + "/" + name, own = base + "." + std::to_string(getpid());
    std::ofstream(own) << source;
    rename(own.c_str(), (base + ".cu").c_str());
}

bool compile(Program &p) {
    string home = own_directory();
    string cache = setting("TERRARIUM_EMULATOR_CACHE", "/tmp/cuda-emulator-cache");
    string level = setting("TERRARIUM_EMULATOR_OPT", "1");
    // Traps where C++ leaves the result open but a GPU does something definite or fails.
    string checks = setting("TERRARIUM_EMULATOR_CHECK", "0") == "1" ? " -fsanitize=alignment,shift,float-cast-overflow -fsanitize-undefined-trap-on-error" : "";
    make_directory(cache);
    Offsets offsets;
    string original = normalize(p.source, offsets);
    keep(p.source, hash(original));
    string source = rewrite(original);
    // The stamp changes with every build of the emulator.
    string base = cache + "/" + hash(source + FLAGS + checks + level + read_file(home + "/stamp"));
    if (access((base + ".so").c_str(), R_OK) != 0) {
        // Other processes may compile the same kernel: write aside, then rename.
        static std::atomic<unsigned> count{0};
        string own = base + "." + std::to_string(getpid()) + "." + std::to_string(count++);
        std::ofstream(own + ".cu") << source;
        rename((own + ".cu").c_str(), (base + ".cu").c_str());
        string command = setting("TERRARIUM_EMULATOR_CXX", "g++") + " " + FLAGS + checks + " -O" + level + " -include " + home +
                         "/O" + level + "/device.h -shared -x c++ " + base + ".cu -o " + own + ".so";
        int status;
        p.log = run(command, status);
        if (status != 0) { p.log = command + "\n" + p.log; return false; }
        rename((own + ".so").c_str(), (base + ".so").c_str());
    }
    p.ptx = "// emulator " + base + ".so\n";
    for (unsigned offset : offsets) p.ptx += std::to_string(offset) + "\n";
    return true;
}

}  // namespace

enum Result { SUCCESS = 0, COMPILATION = 6 };

EXPORT int nvrtcVersion(int *major, int *minor) { *major = 13; *minor = 0; return SUCCESS; }
EXPORT const char *nvrtcGetErrorString(int) { return "see the program log"; }
EXPORT int nvrtcCreateProgram(Program **out, const char *source, const char *, int, const char *const *, const char *const *) {
    *out = new Program{source, "", ""};
    return SUCCESS;
}
EXPORT int nvrtcDestroyProgram(Program **p) { delete *p; *p = nullptr; return SUCCESS; }
EXPORT int nvrtcCompileProgram(Program *p, int, const char *const *) {
    try {
        return compile(*p) ? SUCCESS : COMPILATION;
    } catch (const std::exception &e) {
        p->log = e.what();
        return COMPILATION;
    }
}
EXPORT int nvrtcGetPTXSize(Program *p, size_t *n) { *n = p->ptx.size() + 1; return SUCCESS; }
EXPORT int nvrtcGetPTX(Program *p, char *out) { memcpy(out, p->ptx.c_str(), p->ptx.size() + 1); return SUCCESS; }
EXPORT int nvrtcGetCUBINSize(Program *p, size_t *n) { return nvrtcGetPTXSize(p, n); }
EXPORT int nvrtcGetCUBIN(Program *p, char *out) { return nvrtcGetPTX(p, out); }
EXPORT int nvrtcGetProgramLogSize(Program *p, size_t *n) { *n = p->log.size() + 1; return SUCCESS; }
EXPORT int nvrtcGetProgramLog(Program *p, char *out) { memcpy(out, p->log.c_str(), p->log.size() + 1); return SUCCESS; }
