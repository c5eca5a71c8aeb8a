#include "moe_plugin.h"

#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstring>
#include <new>
#include <utility>

namespace deeptalk {
namespace {

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;
using nvinfer1::PluginTensorDesc;

constexpr char kName[] = "DtMoE";
constexpr char kVersion[] = "1";
constexpr char kNamespace[] = "deeptalk";

enum Input { kX = 0, kIds, kWeights, kSlotTable, kArena, kCarry };

nvinfer1::ILoggerFinder* logger_finder = nullptr;

// Logs through the finder that the registry passes, so that libnvinfer need not be linked. RTX 1.7
// passes none; then the refusal is printed.
void log_error(const std::string& text) noexcept {
    nvinfer1::ILogger* logger = logger_finder ? logger_finder->findLogger() : nullptr;
    const std::string line = "DtMoE: " + text;
    if (logger) {
        logger->log(nvinfer1::ILogger::Severity::kERROR, line.c_str());
    } else {
        std::fprintf(stderr, "%s\n", line.c_str());
    }
}

const std::pair<const char*, int32_t MoeAttributes::*> kIntegers[] = {
    {"group", &MoeAttributes::group},           {"width", &MoeAttributes::width},
    {"ffn_width", &MoeAttributes::ffn_width},   {"num_experts", &MoeAttributes::num_experts},
    {"top_k", &MoeAttributes::top_k},           {"carry", &MoeAttributes::carry},
};

int64_t bytes_of(DataType type) {
    switch (type) {
        case DataType::kINT32: return 4;
        case DataType::kINT64: return 8;
        default: return 0;
    }
}

bool is(int64_t found, int64_t expected) { return found < 0 || found == expected; }

// Reads an integer of 32 bits, whatever type TensorRT passes. False for anything else.
bool read_integer(const PluginField& field, int32_t& value) {
    int64_t found = 0;
    if (!field.data || field.length != 1) return false;
    switch (field.type) {
        case PluginFieldType::kINT32: found = *static_cast<const int32_t*>(field.data); break;
        case PluginFieldType::kINT64: found = *static_cast<const int64_t*>(field.data); break;
        default: return false;
    }
    value = int32_t(found);
    return value == found;
}

constexpr int32_t kLongestText = 16;  // of `weight_dtype`, whose name may end with a zero

bool read_text(const PluginField& field, std::string& value) {
    if (!field.data || field.type != PluginFieldType::kCHAR) return false;
    if (field.length < 1 || field.length > kLongestText) return false;
    const auto* text = static_cast<const char*>(field.data);
    value.assign(text, strnlen(text, size_t(field.length)));
    return true;
}

constexpr int64_t kMaxTokens = 1 << 24;  // tokens x top_k stays within 31 bits
constexpr int64_t kMaxSlots = 1 << 30;

// Rows of a tensor whose last dimension is a row.
int64_t rows_of(const Dims& dims) {
    int64_t rows = 1;
    for (int32_t i = 0; i + 1 < dims.nbDims; ++i) rows *= dims.d[i];
    return rows;
}

}  // namespace

// ---- attributes --------------------------------------------------------------------------------

int32_t MoeAttributes::weight_kind() const {
    if (weight_dtype == "int4") {
        switch (group) {
            case 32: return DT_WEIGHT_INT4_32;
            case 64: return DT_WEIGHT_INT4_64;
            case 128: return DT_WEIGHT_INT4_128;
            default: return -1;
        }
    }
    if (group != 0) return -1;
    if (weight_dtype == "float16") return DT_WEIGHT_FP16;
    if (weight_dtype == "bfloat16") return DT_WEIGHT_BF16;
    return weight_dtype == "int8" ? DT_WEIGHT_INT8 : -1;
}

DtMoeConfig MoeAttributes::config(DataType activation) const {
    const int32_t kind = activation == DataType::kHALF ? DT_ACTIVATION_FP16
                         : activation == DataType::kBF16 ? DT_ACTIVATION_BF16
                                                         : -1;
    return {weight_kind(), kind, width, ffn_width, num_experts, top_k};
}

const char* MoeAttributes::refusal() const {
    if (carry != 0 && carry != 1) return "carry: expected 0 or 1";
    const DtMoeConfig config =
        this->config(weight_kind() == DT_WEIGHT_BF16 ? DataType::kBF16 : DataType::kHALF);
    return dt_moe_refusal(&config);
}

// ---- plugin: core ------------------------------------------------------------------------------

MoePlugin::MoePlugin(MoeAttributes attributes) : attributes_(std::move(attributes)) {}

nvinfer1::IPluginCapability* MoePlugin::getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept {
    switch (type) {
        case nvinfer1::PluginCapabilityType::kCORE: return static_cast<nvinfer1::IPluginV3OneCore*>(this);
        case nvinfer1::PluginCapabilityType::kBUILD: return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
        case nvinfer1::PluginCapabilityType::kRUNTIME: return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
    }
    return nullptr;
}

nvinfer1::IPluginV3* MoePlugin::clone() noexcept { return new (std::nothrow) MoePlugin(attributes_); }

const char* MoePlugin::getPluginName() const noexcept { return kName; }
const char* MoePlugin::getPluginVersion() const noexcept { return kVersion; }
const char* MoePlugin::getPluginNamespace() const noexcept { return kNamespace; }

// ---- plugin: build -----------------------------------------------------------------------------

const char* MoePlugin::refusal(int32_t position, const PluginTensorDesc& tensor) const {
    const Dims& dims = tensor.dims;
    const int64_t last = dims.nbDims > 0 ? dims.d[dims.nbDims - 1] : 0;
    if (tensor.format != nvinfer1::TensorFormat::kLINEAR) return "tensors must be linear";
    const int32_t output = position - num_inputs();
    if (output == 1) return tensor.type == DataType::kINT32 ? nullptr : "missing: expected int32";
    if (output == 0 && attributes_.carry) {
        return tensor.type == DataType::kFLOAT ? nullptr : "output with carry: expected float32";
    }
    if (position == kX || output == 0) {
        const DtMoeConfig config = attributes_.config(tensor.type);
        if (const char* why = dt_moe_refusal(&config)) return why;
        return dims.nbDims >= 2 && is(last, attributes_.width) ? nullptr : "x: expected (.., width)";
    }
    switch (position) {
        case kIds:
            if (tensor.type != DataType::kINT32) return "topk_ids: expected int32";
            return dims.nbDims >= 2 && is(last, attributes_.top_k) ? nullptr : "topk_ids: expected (.., top_k)";
        case kWeights:
            if (tensor.type != DataType::kFLOAT) return "topk_weights: expected float32";
            return dims.nbDims >= 2 && is(last, attributes_.top_k) ? nullptr
                                                                   : "topk_weights: expected (.., top_k)";
        case kSlotTable:
            if (tensor.type != DataType::kINT32) return "slot_table: expected int32";
            return dims.nbDims == 1 && is(last, attributes_.num_experts) ? nullptr
                                                                        : "slot_table: expected (num_experts)";
        case kArena: {
            const DtMoeConfig config = attributes_.config(
                attributes_.weight_kind() == DT_WEIGHT_BF16 ? DataType::kBF16 : DataType::kHALF);
            const int64_t element = bytes_of(tensor.type);
            if (element == 0) return "slot_arena: expected int32 or int64";
            const int64_t record = dt_moe_record_layout(&config).record_bytes;
            return dims.nbDims == 2 && is(last, record / element)
                       ? nullptr
                       : "slot_arena: expected (num_slots, record), a record as expert_record.py lays it out";
        }
        case kCarry:
            if (tensor.type != DataType::kFLOAT) return "carry: expected float32";
            return dims.nbDims >= 2 && is(last, attributes_.width) ? nullptr : "carry: expected (.., width)";
        default: return "no such input";
    }
}

bool MoePlugin::supportsFormatCombination(int32_t position, const nvinfer1::DynamicPluginTensorDesc* tensors,
                                          int32_t num_inputs, int32_t num_outputs) noexcept {
    if (num_inputs != this->num_inputs() || num_outputs != 2) return false;
    if (refusal(position, tensors[position].desc)) return false;
    // Without carry the output has the type of x.
    return position != num_inputs || attributes_.carry || tensors[position].desc.type == tensors[kX].desc.type;
}

int32_t MoePlugin::configurePlugin(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t num_inputs,
                                   const nvinfer1::DynamicPluginTensorDesc*, int32_t num_outputs) noexcept {
    if (num_inputs != this->num_inputs() || num_outputs != 2) {
        log_error(std::to_string(num_inputs) + " inputs: expected " + std::to_string(this->num_inputs()));
        return -1;
    }
    for (int32_t i = 0; i < num_inputs; ++i) {
        if (const char* why = refusal(i, inputs[i].desc)) {
            log_error(why);
            return -1;
        }
    }
    return 0;
}

int32_t MoePlugin::getNbOutputs() const noexcept { return 2; }

int32_t MoePlugin::getOutputDataTypes(DataType* output_types, int32_t num_outputs, const DataType* input_types,
                                      int32_t num_inputs) const noexcept {
    if (num_inputs != this->num_inputs() || num_outputs != 2) return -1;
    output_types[0] = attributes_.carry ? DataType::kFLOAT : input_types[kX];
    output_types[1] = DataType::kINT32;
    return 0;
}

int32_t MoePlugin::getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t num_inputs,
                                   const nvinfer1::DimsExprs*, int32_t, nvinfer1::DimsExprs* outputs,
                                   int32_t num_outputs, nvinfer1::IExprBuilder& builder) noexcept {
    if (num_inputs != this->num_inputs() || num_outputs != 2) return -1;
    outputs[0] = inputs[kX];
    outputs[1].nbDims = 1;
    outputs[1].d[0] = builder.constant(1);
    return 0;
}

size_t MoePlugin::getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t,
                                   const nvinfer1::DynamicPluginTensorDesc*, int32_t) const noexcept {
    const DtMoeConfig config = attributes_.config(inputs[kX].desc.type);
    const int64_t tokens = rows_of(inputs[kX].max);
    // Beyond one pass the workspace does not grow, so any larger count will do.
    return size_t(dt_moe_workspace_bytes(&config, int32_t(tokens < (1 << 20) ? tokens : 1 << 20)));
}

// ---- plugin: runtime ---------------------------------------------------------------------------

int32_t MoePlugin::onShapeChange(const PluginTensorDesc* inputs, int32_t num_inputs, const PluginTensorDesc*,
                                 int32_t) noexcept {
    if (num_inputs != this->num_inputs()) return -1;
    for (int32_t i = 0; i < num_inputs; ++i) {
        if (const char* why = refusal(i, inputs[i])) {
            log_error(why);
            return -1;
        }
    }
    const int64_t tokens = rows_of(inputs[kX].dims);
    if (tokens > kMaxTokens || inputs[kArena].dims.d[0] > kMaxSlots) {
        log_error("expected at most 2^24 tokens and 2^30 slots");
        return -1;
    }
    if (rows_of(inputs[kIds].dims) != tokens || rows_of(inputs[kWeights].dims) != tokens ||
        (attributes_.carry && rows_of(inputs[kCarry].dims) != tokens)) {
        log_error("x, topk_ids, topk_weights and carry differ in their number of tokens");
        return -1;
    }
    return 0;
}

int32_t MoePlugin::enqueue(const PluginTensorDesc* input_descs, const PluginTensorDesc*,
                           const void* const* inputs, void* const* outputs, void* workspace,
                           cudaStream_t stream) noexcept {
    const DtMoeConfig config = attributes_.config(input_descs[kX].type);
    DtMoeCall call{};
    call.x = inputs[kX];
    call.topk_ids = static_cast<const int32_t*>(inputs[kIds]);
    call.topk_weights = static_cast<const float*>(inputs[kWeights]);
    call.slot_table = static_cast<const int32_t*>(inputs[kSlotTable]);
    call.slot_arena = inputs[kArena];
    call.carry = attributes_.carry ? static_cast<const float*>(inputs[kCarry]) : nullptr;
    call.out = outputs[0];
    call.missing = static_cast<int32_t*>(outputs[1]);
    call.workspace = workspace;
    call.tokens = int32_t(rows_of(input_descs[kX].dims));
    call.num_slots = int32_t(input_descs[kArena].dims.d[0]);
    call.float_out = attributes_.carry;
    call.overlap = overlap_;
    const int32_t error = dt_moe_enqueue(&config, &call, stream);
    if (error != 0) log_error(cudaGetErrorString(static_cast<cudaError_t>(error)));
    return error;
}

nvinfer1::IPluginV3* MoePlugin::attachToContext(nvinfer1::IPluginResourceContext*) noexcept {
    auto* attached = new (std::nothrow) MoePlugin(attributes_);
    int device = 0, major = 0;
    if (attached && cudaGetDevice(&device) == cudaSuccess &&
        cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess) {
        attached->overlap_ = major >= 9;
    }
    return attached;
}

const nvinfer1::PluginFieldCollection* MoePlugin::getFieldsToSerialize() noexcept {
    fields_.clear();
    fields_.emplace_back("weight_dtype", attributes_.weight_dtype.c_str(), PluginFieldType::kCHAR,
                         int32_t(attributes_.weight_dtype.size()));
    for (const auto& [name, member] : kIntegers) {
        fields_.emplace_back(name, &(attributes_.*member), PluginFieldType::kINT32, 1);
    }
    collection_ = {int32_t(fields_.size()), fields_.data()};
    return &collection_;
}

// ---- creator -----------------------------------------------------------------------------------

MoeCreator::MoeCreator() {
    fields_.emplace_back("weight_dtype", nullptr, PluginFieldType::kCHAR, 0);
    for (const auto& [name, member] : kIntegers) fields_.emplace_back(name, nullptr, PluginFieldType::kINT32, 1);
    collection_ = {int32_t(fields_.size()), fields_.data()};
}

nvinfer1::IPluginV3* MoeCreator::createPlugin(const char*, const nvinfer1::PluginFieldCollection* fields,
                                              nvinfer1::TensorRTPhase) noexcept {
    MoeAttributes attributes;
    for (int32_t i = 0; fields && i < fields->nbFields; ++i) {
        const PluginField& field = fields->fields[i];
        if (!field.name) continue;
        if (!std::strcmp(field.name, "weight_dtype") && !read_text(field, attributes.weight_dtype)) {
            log_error("weight_dtype: expected a name of at most 16 characters");
            return nullptr;
        }
        for (const auto& [name, member] : kIntegers) {
            if (!std::strcmp(field.name, name) && !read_integer(field, attributes.*member)) {
                log_error(std::string(name) + ": expected one whole number of 32 bits");
                return nullptr;
            }
        }
    }
    if (const char* why = attributes.refusal()) {
        log_error(why);
        return nullptr;
    }
    return new (std::nothrow) MoePlugin(std::move(attributes));
}

const nvinfer1::PluginFieldCollection* MoeCreator::getFieldNames() noexcept { return &collection_; }
const char* MoeCreator::getPluginName() const noexcept { return kName; }
const char* MoeCreator::getPluginVersion() const noexcept { return kVersion; }
const char* MoeCreator::getPluginNamespace() const noexcept { return kNamespace; }

}  // namespace deeptalk

// The symbols that IPluginRegistry::loadLibrary looks for.
extern "C" __attribute__((visibility("default"))) nvinfer1::IPluginCreatorInterface* const* getCreators(
    int32_t& count) {
    static deeptalk::MoeCreator creator;
    static nvinfer1::IPluginCreatorInterface* creators[] = {&creator};
    count = 1;
    return creators;
}

extern "C" __attribute__((visibility("default"))) void setLoggerFinder(nvinfer1::ILoggerFinder* finder) {
    deeptalk::logger_finder = finder;
}

#define DT_TEXT_OF(value) #value
#define DT_TEXT(value) DT_TEXT_OF(value)

// The runtime calls this before TensorRT loads the plugin; it needs neither TensorRT nor a GPU.
extern "C" __attribute__((visibility("default"))) const char* dt_moe_build() {
    return "{\"abi\": " DT_TEXT(DT_MOE_ABI) ", \"sm\": \"" DT_SM "\", \"ptx\": \"" DT_PTX "\"}";
}
