// deeptalk::DtMoE, the routed experts of one layer, as a TensorRT plugin (IPluginV3, V3One creator).
#pragma once

#include <NvInferRuntime.h>

#include <string>
#include <vector>

#include "moe_launch.h"

namespace deeptalk {

// The node's attributes. `weight_dtype` is float16, bfloat16, int8 or int4.
struct MoeAttributes {
    std::string weight_dtype;
    int32_t group = 0;  // int4: 32, 64 or 128; else 0
    int32_t width = 0, ffn_width = 0, num_experts = 0, top_k = 0;
    int32_t carry = 0;  // 1: a sixth input (.., width) float32 is added to, and the output is float32

    // The weight kind, or -1 for one that no kernel reads.
    int32_t weight_kind() const;
    DtMoeConfig config(nvinfer1::DataType activation) const;
    // Null if the kernels support it, else the reason.
    const char* refusal() const;
};

// Inputs: x (.., width), topk_ids int32 (.., top_k), topk_weights float32 (.., top_k), slot_table
// int32 (num_experts), slot_arena (num_slots, record) and with `carry` a sixth.
// Outputs: (.., width) as x, and int32 (1): the uses whose expert had no slot.
// The arena is opaque bytes, declared int32, or int64 where it passes 2^31 elements. TensorRT takes no
// uint8 in a plugin, and for int8 it writes 8 bytes for every byte of a record into the plan.
class MoePlugin final : public nvinfer1::IPluginV3,
                        public nvinfer1::IPluginV3OneCore,
                        public nvinfer1::IPluginV3OneBuild,
                        public nvinfer1::IPluginV3OneRuntime {
  public:
    explicit MoePlugin(MoeAttributes attributes);

    nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override;
    nvinfer1::IPluginV3* clone() noexcept override;

    // Core
    const char* getPluginName() const noexcept override;
    const char* getPluginVersion() const noexcept override;
    const char* getPluginNamespace() const noexcept override;

    // Build
    int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t num_inputs,
                            const nvinfer1::DynamicPluginTensorDesc* outputs,
                            int32_t num_outputs) noexcept override;
    int32_t getOutputDataTypes(nvinfer1::DataType* output_types, int32_t num_outputs,
                               const nvinfer1::DataType* input_types, int32_t num_inputs) const noexcept override;
    int32_t getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t num_inputs,
                            const nvinfer1::DimsExprs* shape_inputs, int32_t num_shape_inputs,
                            nvinfer1::DimsExprs* outputs, int32_t num_outputs,
                            nvinfer1::IExprBuilder& builder) noexcept override;
    bool supportsFormatCombination(int32_t position, const nvinfer1::DynamicPluginTensorDesc* tensors,
                                   int32_t num_inputs, int32_t num_outputs) noexcept override;
    int32_t getNbOutputs() const noexcept override;
    size_t getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t num_inputs,
                            const nvinfer1::DynamicPluginTensorDesc* outputs,
                            int32_t num_outputs) const noexcept override;

    // Runtime
    int32_t onShapeChange(const nvinfer1::PluginTensorDesc* inputs, int32_t num_inputs,
                          const nvinfer1::PluginTensorDesc* outputs, int32_t num_outputs) noexcept override;
    int32_t enqueue(const nvinfer1::PluginTensorDesc* input_descs, const nvinfer1::PluginTensorDesc* output_descs,
                    const void* const* inputs, void* const* outputs, void* workspace,
                    cudaStream_t stream) noexcept override;
    nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext* context) noexcept override;
    const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override;

  private:
    int32_t num_inputs() const { return attributes_.carry ? 6 : 5; }
    // Null if a tensor may be at `position`, else the reason. A size of -1 means any.
    const char* refusal(int32_t position, const nvinfer1::PluginTensorDesc& tensor) const;

    MoeAttributes attributes_;
    bool overlap_ = false;  // the card can start a kernel before its predecessor has ended
    std::vector<nvinfer1::PluginField> fields_;
    nvinfer1::PluginFieldCollection collection_{};
};

class MoeCreator final : public nvinfer1::IPluginCreatorV3One {
  public:
    MoeCreator();
    nvinfer1::IPluginV3* createPlugin(const char* name, const nvinfer1::PluginFieldCollection* fields,
                                      nvinfer1::TensorRTPhase phase) noexcept override;
    const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override;
    const char* getPluginName() const noexcept override;
    const char* getPluginVersion() const noexcept override;
    const char* getPluginNamespace() const noexcept override;

  private:
    std::vector<nvinfer1::PluginField> fields_;
    nvinfer1::PluginFieldCollection collection_{};
};

}  // namespace deeptalk
