/* A libcuda without a GPU: keeps account of the calls that fusedstep's WHILE node makes.
 *
 * It refuses what the driver refuses, as far as these calls go: a stream that is recorded already
 * or not at all, nodes and handles that it did not give out, memory that is registered twice. Any
 * other call is an error. Tests look into it and make calls fail through the stub_* functions.
 */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

typedef int Result;
typedef void *Ptr;
typedef unsigned long long U64;

enum {
    SUCCESS = 0, INVALID_VALUE = 1, INVALID_CONTEXT = 201, INVALID_HANDLE = 400,
    ILLEGAL_STATE = 401, NOT_FOUND = 500, ALREADY_REGISTERED = 712, NOT_REGISTERED = 713,
    CAPTURE_UNSUPPORTED = 900, CAPTURE_UNMATCHED = 903, CAPTURE_UNJOINED = 904, UNKNOWN = 999,
};
enum { KERNEL_NODE = 0, CONDITIONAL_NODE = 13, WHILE = 1, ASSIGN_DEFAULT = 1 };
enum { STREAMS = 64, GRAPHS = 64, NODES = 256, PAGES = 16, LOG_BYTES = 1 << 16 };
#define CONTEXT ((Ptr)0xC7)
#define DEVICE_OFFSET (1ull << 56) /* of a registered page: the device's addresses are its own */

typedef struct { unsigned char bytes[8]; } Edge; /* CUgraphEdgeData: all zero is a plain edge */
typedef struct Graph { int is_body, recorded; U64 handle; } Graph;
typedef struct Node { Graph *graph; int type; U64 args[4]; } Node;
typedef struct Stream { Ptr handle; Graph *graph; const Node *last; int by_driver; } Stream;
/* CUgraphNodeParams: its type, three reserved words, and a union, of which this is the member. */
typedef struct { int type, reserved[3]; U64 handle; int kind; unsigned size; Ptr *graphs; Ptr context; } NodeParams;

static Graph graphs[GRAPHS];
static Node nodes[NODES];
static Stream streams[STREAMS];
static Ptr pages[PAGES], body_out[GRAPHS];
static const Node *last_list[STREAMS];
static int num_graphs, num_nodes, num_streams, num_modules, fail_code, fail_after;
static char fail_name[64], text[LOG_BYTES];
static const char *image;
static Edge no_edges[1];

static void note(const char *line) {
    if (strlen(text) + strlen(line) + 2 < LOG_BYTES) {
        strcat(text, line);
        strcat(text, "\n");
    }
}

static Result enter(const char *name) {
    note(name);
    size_t n = strlen(fail_name);
    int same = n && !strncmp(name, fail_name, n) && (name[n] == 0 || name[n] == '_');
    return same && fail_after-- <= 0 ? fail_code : SUCCESS;
}
#define ENTER(name) do { Result code = enter(name); if (code) return code; } while (0)
#define NEED(condition, code) do { if (!(condition)) { note("  refused: " #condition); return code; } } while (0)

static Stream *stream_of(Ptr handle) {
    for (int i = 0; i < num_streams; i++)
        if (streams[i].handle == handle) return &streams[i];
    streams[num_streams] = (Stream){handle, NULL, NULL, 0};
    return &streams[num_streams++];
}

static int is_graph(Graph *graph) { return graph >= graphs && graph < graphs + num_graphs; }
static int is_node(const Node *node) { return node >= nodes && node < nodes + num_nodes; }

static Node *add(Graph *graph, int type) {
    nodes[num_nodes] = (Node){graph, type, {0}};
    return &nodes[num_nodes++];
}

/* --- What tests call ------------------------------------------------------------------------- */

void stub_reset(void) { /* pages and modules stay: they are what may leak */
    memset(streams, 0, sizeof streams);
    num_graphs = num_nodes = num_streams = 0;
    fail_name[0] = text[0] = 0;
}

void stub_fail(const char *name, int code, int after) {
    snprintf(fail_name, sizeof fail_name, "%s", name);
    fail_code = code;
    fail_after = after;
}

const char *stub_calls(void) { return text; }
int stub_modules(void) { return num_modules; }

int stub_pages(void) {
    int n = 0;
    for (int i = 0; i < PAGES; i++) n += pages[i] != NULL;
    return n;
}

int stub_captures(void) {
    int n = 0;
    for (int i = 0; i < num_streams; i++) n += streams[i].graph != NULL;
    return n;
}

/* torch begins and ends to record a stream, and launches a kernel there. */
void stub_begin(Ptr handle) {
    Stream *stream = stream_of(handle);
    graphs[num_graphs] = (Graph){0, 1, 0};
    *stream = (Stream){handle, &graphs[num_graphs++], NULL, 0};
}

int stub_end(Ptr handle) {
    Stream *stream = stream_of(handle);
    Graph *graph = stream->graph;
    if (!graph) return CAPTURE_UNMATCHED;
    const Node *last = stream->last;
    stream->graph = NULL;
    for (int i = 0; i < num_nodes; i++) /* the last of the nodes must be the stream's */
        if (nodes[i].graph == graph && &nodes[i] > last) return CAPTURE_UNJOINED;
    return SUCCESS;
}

void stub_launch(Ptr handle) {
    Stream *stream = stream_of(handle);
    stream->last = add(stream->graph, KERNEL_NODE);
}

const U64 *stub_arguments(void) { /* of the kernel that was recorded last */
    for (int i = num_nodes; i-- > 0;)
        if (nodes[i].type == KERNEL_NODE && nodes[i].graph->is_body) return nodes[i].args;
    return NULL;
}

/* --- The driver ------------------------------------------------------------------------------ */

static Result module_load(Ptr *module, const void *text_of_it) {
    ENTER("cuModuleLoadData");
    image = text_of_it;
    NEED(!strncmp(image, ".version", 8), INVALID_VALUE);
    num_modules++;
    *module = (Ptr)0x111;
    return SUCCESS;
}

static Result module_unload(Ptr module) {
    ENTER("cuModuleUnload");
    NEED(module == (Ptr)0x111 && num_modules > 0, INVALID_HANDLE);
    num_modules--;
    return SUCCESS;
}

static Result module_function(Ptr *function, Ptr module, const char *name) {
    ENTER("cuModuleGetFunction");
    char entry[80];
    snprintf(entry, sizeof entry, ".visible .entry %s", name);
    NEED(module == (Ptr)0x111 && strstr(image, entry), NOT_FOUND);
    *function = (Ptr)0x222;
    return SUCCESS;
}

static int mapped(Ptr page) {
    unsigned char there;
    return mincore((Ptr)((uintptr_t)page & ~4095ul), 1, &there) == 0;
}

static Result host_register(Ptr page, size_t num_bytes, unsigned flags) {
    ENTER("cuMemHostRegister");
    NEED(num_bytes == 8 && flags == 3 && mapped(page), INVALID_VALUE); /* portable, mapped */
    int free_place = -1;
    for (int i = 0; i < PAGES; i++) {
        NEED(pages[i] != page, ALREADY_REGISTERED);
        if (!pages[i]) free_place = i;
    }
    pages[free_place] = page;
    return SUCCESS;
}

static Result host_unregister(Ptr page) {
    ENTER("cuMemHostUnregister");
    NEED(mapped(page), INVALID_VALUE);
    for (int i = 0; i < PAGES; i++)
        if (pages[i] == page) {
            pages[i] = NULL;
            return SUCCESS;
        }
    return NOT_REGISTERED;
}

static Result host_pointer(U64 *pointer, Ptr page, unsigned flags) {
    ENTER("cuMemHostGetDevicePointer");
    for (int i = 0; i < PAGES; i++)
        if (pages[i] == page && flags == 0) {
            *pointer = (U64)(uintptr_t)page + DEVICE_OFFSET;
            return SUCCESS;
        }
    return INVALID_VALUE;
}

static Result current_context(Ptr *context) {
    ENTER("cuCtxGetCurrent");
    *context = CONTEXT;
    return SUCCESS;
}

static Result capture_info(Ptr handle, int *status, U64 *id, Ptr *graph, const Ptr **deps, size_t *n) {
    Stream *stream = stream_of(handle);
    *status = stream->graph != NULL;
    if (id) *id = 5;
    if (graph) *graph = stream->graph;
    last_list[stream - streams] = stream->last;
    if (deps) *deps = (const Ptr *)&last_list[stream - streams];
    if (n) *n = stream->last != NULL;
    return SUCCESS;
}

static Result capture_info_v2(Ptr s, int *status, U64 *id, Ptr *graph, const Ptr **deps, size_t *n) {
    ENTER("cuStreamGetCaptureInfo_v2");
    return capture_info(s, status, id, graph, deps, n);
}

static Result capture_info_v3(Ptr s, int *status, U64 *id, Ptr *graph, const Ptr **deps, const Edge **edges, size_t *n) {
    ENTER("cuStreamGetCaptureInfo_v3");
    if (edges) *edges = no_edges;
    return capture_info(s, status, id, graph, deps, n);
}

static Result condition_handle(U64 *handle, Graph *graph, Ptr context, unsigned start, unsigned flags) {
    ENTER("cuGraphConditionalHandleCreate");
    NEED(is_graph(graph) && start == 1 && flags == ASSIGN_DEFAULT, INVALID_VALUE);
    NEED(context == CONTEXT, INVALID_CONTEXT);
    *handle = graph->handle = 0xABCDEF0123456700ull + (graph - graphs);
    return SUCCESS;
}

static Result add_node(Ptr *node, Graph *graph, const Ptr *deps, size_t n, NodeParams *params) {
    NEED(is_graph(graph), INVALID_VALUE);
    for (size_t i = 0; i < n; i++) NEED(is_node(deps[i]), INVALID_VALUE);
    for (int i = 0; i < num_streams; i++) /* after all that its stream has recorded */
        if (streams[i].graph == graph)
            NEED(streams[i].last ? n == 1 && deps[0] == streams[i].last : n == 0, INVALID_VALUE);
    for (int i = 0; i < 3; i++) NEED(params->reserved[i] == 0, INVALID_VALUE);
    NEED(params->type == CONDITIONAL_NODE && params->kind == WHILE, INVALID_VALUE);
    NEED(params->handle == graph->handle && params->size == 1, INVALID_VALUE);
    NEED(params->context == CONTEXT, INVALID_CONTEXT);
    graphs[num_graphs] = (Graph){1, 0, graph->handle};
    body_out[num_graphs] = &graphs[num_graphs];
    params->graphs = &body_out[num_graphs++];
    *node = add(graph, CONDITIONAL_NODE);
    return SUCCESS;
}

static Result add_node_v1(Ptr *node, Graph *graph, const Ptr *deps, size_t n, NodeParams *params) {
    ENTER("cuGraphAddNode_v1");
    return add_node(node, graph, deps, n, params);
}

static Result add_node_v2(Ptr *node, Graph *graph, const Ptr *deps, const Edge *edges, size_t n, NodeParams *params) {
    ENTER("cuGraphAddNode_v2");
    NEED(!edges, INVALID_VALUE); /* plain ones */
    return add_node(node, graph, deps, n, params);
}

static Result update(Ptr handle, Ptr *deps, size_t n, unsigned flags) {
    Stream *stream = stream_of(handle);
    NEED(stream->graph, ILLEGAL_STATE);
    NEED(n == 1 && is_node(deps[0]) && flags == 1, INVALID_VALUE); /* 1: instead of the others */
    NEED(((Node *)deps[0])->graph == stream->graph, INVALID_VALUE);
    stream->last = deps[0];
    return SUCCESS;
}

static Result update_v1(Ptr stream, Ptr *deps, size_t n, unsigned flags) {
    ENTER("cuStreamUpdateCaptureDependencies_v1");
    return update(stream, deps, n, flags);
}

static Result update_v2(Ptr stream, Ptr *deps, const Edge *edges, size_t n, unsigned flags) {
    ENTER("cuStreamUpdateCaptureDependencies_v2");
    NEED(!edges, INVALID_VALUE);
    return update(stream, deps, n, flags);
}

static Result begin_to_graph(Ptr handle, Graph *graph, const Ptr *deps, const Edge *edges, size_t n, int mode) {
    ENTER("cuStreamBeginCaptureToGraph");
    Stream *stream = stream_of(handle);
    NEED(handle, CAPTURE_UNSUPPORTED);
    NEED(!stream->graph, ILLEGAL_STATE);
    NEED(is_graph(graph) && graph->is_body && !graph->recorded, INVALID_VALUE);
    NEED(!deps && !edges && n == 0 && mode == 1, INVALID_VALUE); /* thread local */
    graph->recorded = 1;
    *stream = (Stream){handle, graph, NULL, 1};
    return SUCCESS;
}

static Result end_capture(Ptr handle, Ptr *graph) {
    Stream *stream = stream_of(handle);
    Graph *recorded = stream->graph;
    if (stream->by_driver) stream->graph = NULL; /* also where it fails */
    ENTER("cuStreamEndCapture");
    NEED(recorded && stream->by_driver, ILLEGAL_STATE);
    if (graph) *graph = recorded;
    return SUCCESS;
}

static Result launch(Ptr function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared, Ptr handle, U64 **params, Ptr *extra) {
    ENTER("cuLaunchKernel");
    Stream *stream = stream_of(handle);
    NEED(function == (Ptr)0x222 && gx * gy * gz * bx * by * bz == 1 && !shared, INVALID_VALUE);
    NEED(stream->graph && stream->graph->is_body && !extra, INVALID_VALUE);
    NEED(*params[0] == stream->graph->handle, INVALID_VALUE);
    Node *node = add(stream->graph, KERNEL_NODE);
    for (int i = 0; i < 4; i++) node->args[i] = *params[i];
    stream->last = node;
    return SUCCESS;
}

static Result init(unsigned flags) { return flags ? INVALID_VALUE : SUCCESS; }
static Result other(void) { note("another call"); return UNKNOWN; }
Result cuInit(unsigned flags) { return init(flags); }
Result cuDriverGetVersion(int *version) { *version = 13000; return SUCCESS; }

/* Which version of a call a program gets follows from the CUDA version that it was built for. */
Result cuGetProcAddress_v2(const char *name, Ptr *function, int version, U64 flags, int *status) {
    (void)flags;
    struct { const char *name; int from; Ptr function; } table[] = {
        {"cuInit", 0, init}, {"cuDriverGetVersion", 0, cuDriverGetVersion},
        {"cuModuleLoadData", 0, module_load}, {"cuModuleUnload", 0, module_unload},
        {"cuModuleGetFunction", 0, module_function}, {"cuMemHostRegister", 0, host_register},
        {"cuMemHostUnregister", 0, host_unregister}, {"cuMemHostGetDevicePointer", 0, host_pointer},
        {"cuCtxGetCurrent", 0, current_context}, {"cuStreamGetCaptureInfo", 0, capture_info_v2},
        {"cuStreamGetCaptureInfo", 12030, capture_info_v3}, {"cuGraphAddNode", 0, add_node_v1},
        {"cuGraphConditionalHandleCreate", 0, condition_handle},
        {"cuGraphAddNode", 12030, add_node_v2}, {"cuStreamEndCapture", 0, end_capture},
        {"cuStreamUpdateCaptureDependencies", 0, update_v1}, {"cuLaunchKernel", 0, launch},
        {"cuStreamUpdateCaptureDependencies", 12030, update_v2},
        {"cuStreamBeginCaptureToGraph", 0, begin_to_graph},
    };
    *function = (Ptr)other;
    for (size_t i = 0; i < sizeof table / sizeof *table; i++)
        if (!strcmp(table[i].name, name) && version >= table[i].from) *function = table[i].function;
    if (status) *status = 0;
    return SUCCESS;
}
