//! LoRA adapters in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use burn::module::Param;
use burn::tensor::{DType, Tensor, TensorData};
use serde_json::{Map, Value, json};
use terrarium_kernels::KernelBackend;
use terrarium_models::layers::Lora;
use terrarium_models::{Decoder, DecoderConfig, LoraConfig, LoraReport, LoraTargets, Rows};

use crate::atomic::{StagedDir, write_atomic};
use crate::error::AdapterError;
use crate::tensors::{cast, read_safetensors, write_safetensors};
use crate::{Error, Result};

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";
const PREFIX: &str = "base_model.model.";

/// The part of adapter_config.json that is used.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterConfig {
    /// Rank of each adapter.
    pub rank: usize,
    /// The adapter's share is `alpha / rank`.
    pub alpha: f32,
    /// Names (or ends of names) of the adapted modules.
    pub target_modules: Vec<String>,
    /// Modules with a rank and an alpha of their own, by name or end of name.
    pub exceptions: BTreeMap<String, (usize, f32)>,
    /// What the adapter was trained on.
    pub base_model: Option<String>,
}

impl AdapterConfig {
    /// Reads a directory's adapter_config.json; `None` where there is none.
    pub fn open(dir: &Path) -> Result<Option<Self>> {
        let file = dir.join(CONFIG);
        if !file.is_file() {
            return Ok(None);
        }
        let text = std::fs::read_to_string(&file).map_err(Error::io("read", &file))?;
        let map: Map<String, Value> = serde_json::from_str(&text).map_err(|source| Error::Json { file: file.clone(), source })?;
        Self::from_map(&map).map(Some).map_err(|problem| AdapterError::Unsupported { file, problem }.into())
    }

    fn from_map(map: &Map<String, Value>) -> Result<Self, String> {
        let kind = map.get("peft_type").and_then(Value::as_str).unwrap_or("LORA");
        if kind != "LORA" {
            return Err(format!("peft_type is {kind}; only LORA adapters are read"));
        }
        for key in ["use_dora", "fan_in_fan_out", "lora_bias", "use_qalora"] {
            if map.get(key).and_then(Value::as_bool) == Some(true) {
                return Err(format!("{key} is not supported"));
            }
        }
        if let Some(bias) = map.get("bias").and_then(Value::as_str).filter(|b| *b != "none") {
            return Err(format!("bias is `{bias}`; adapted biases are not supported"));
        }
        let empty = |key: &str| match map.get(key) {
            None | Some(Value::Null) => true,
            Some(Value::Array(a)) => a.is_empty(),
            Some(Value::Object(o)) => o.is_empty(),
            Some(_) => false,
        };
        if !empty("modules_to_save") {
            return Err("modules_to_save is not supported".into());
        }
        let rank = map
            .get("r")
            .and_then(Value::as_u64)
            .and_then(|r| usize::try_from(r).ok())
            .filter(|&r| r > 0)
            .ok_or("r is missing or not positive")?;
        let mut alpha = map.get("lora_alpha").and_then(Value::as_f64).unwrap_or(rank as f64) as f32;
        let exceptions = exceptions(map, rank, alpha)?;
        if map.get("use_rslora").and_then(Value::as_bool) == Some(true) {
            if !exceptions.is_empty() {
                return Err("rank_pattern and alpha_pattern together with use_rslora are not supported".into());
            }
            // alpha / sqrt(rank) there, alpha / rank here.
            alpha *= (rank as f32).sqrt();
        }
        let target_modules = match map.get("target_modules") {
            Some(Value::Array(names)) => names.iter().filter_map(|n| n.as_str().map(String::from)).collect(),
            Some(Value::String(name)) => vec![name.clone()],
            _ => vec![],
        };
        let base_model = map.get("base_model_name_or_path").and_then(Value::as_str).filter(|b| !b.is_empty()).map(String::from);
        Ok(Self { rank, alpha, target_modules, exceptions, base_model })
    }

    /// `alpha / rank` of a module.
    fn scale(&self, module: &str) -> f32 {
        let own = self.exceptions.iter().find(|(name, _)| module == **name || module.ends_with(&format!(".{name}")));
        let (rank, alpha) = own.map_or((self.rank, self.alpha), |(_, own)| *own);
        alpha / rank as f32
    }
}

/// PEFT's `rank_pattern` and `alpha_pattern`, as far as they are names.
fn exceptions(map: &Map<String, Value>, rank: usize, alpha: f32) -> Result<BTreeMap<String, (usize, f32)>, String> {
    let mut own: BTreeMap<String, (usize, f32)> = BTreeMap::new();
    for key in ["rank_pattern", "alpha_pattern"] {
        let pattern = map.get(key).and_then(Value::as_object);
        for (name, value) in pattern.into_iter().flatten() {
            let plain = name.chars().all(|c| c.is_alphanumeric() || matches!(c, '_' | '.'));
            let value = value.as_f64().filter(|v| *v > 0.0 && plain).ok_or_else(|| format!("{key} of `{name}` is not supported"))?;
            let entry = own.entry(name.clone()).or_insert((rank, alpha));
            if key == "rank_pattern" { entry.0 = value as usize } else { entry.1 = value as f32 }
        }
    }
    Ok(own)
}

/// Module path -> PEFT's name of the module and which of its rows, for every weight that can be adapted.
fn module_keys(config: &DecoderConfig) -> HashMap<String, (String, Option<Rows>)> {
    let strip = |s: &str| s.strip_suffix(".weight").map(String::from);
    config.table().entries.iter().filter_map(|e| Some((strip(&e.path)?, (strip(&e.key)?, e.rows)))).collect()
}

fn leaf(path: &str) -> &str {
    path.rsplit('.').next().unwrap_or(path)
}

/// Saves a model's adapters alone, in the format that PEFT opens over `base_model`.
pub fn save_adapter<B: KernelBackend>(
    dir: &Path,
    model: &Decoder<B>,
    config: &DecoderConfig,
    lora: &LoraConfig,
    base_model: &str,
) -> Result<()> {
    let config = &config.in_transformers().unwrap_or_else(|_| config.clone());
    let keys = module_keys(config);
    let (mut adapted, mut plain) = (BTreeMap::<String, Vec<Part>>::new(), BTreeSet::new());
    model.clone().for_each_linear(&mut |path, linear| {
        let Some((key, rows)) = keys.get(path) else { return };
        let Some(adapter) = &linear.lora else {
            plain.insert(key.clone());
            return;
        };
        let [a, b] = [&adapter.a, &adapter.b].map(|value| cast(value.val().into_data(), DType::F32));
        adapted.entry(key.clone()).or_default().push(Part { a, b, rows: *rows });
    });
    // Of a fused projection some parts may be adapted and others not.
    plain.retain(|key| !adapted.contains_key(key));
    let mut tensors = Vec::new();
    let mut exceptions = BTreeMap::new();
    for (key, parts) in &adapted {
        let (a, b) = fuse(parts);
        if parts.len() > 1 {
            exceptions.insert(leaf(key).to_string(), parts.len());
        }
        tensors.push((format!("{PREFIX}{key}.lora_A.weight"), a));
        tensors.push((format!("{PREFIX}{key}.lora_B.weight"), b));
    }
    let adapted: BTreeSet<String> = adapted.into_keys().collect();
    if adapted.is_empty() {
        return Err(AdapterError::Model("the model has no adapters to save".into()).into());
    }
    let staged = StagedDir::new(dir)?;
    let metadata = BTreeMap::from([("format".to_string(), "pt".to_string())]);
    write_safetensors(&staged.path().join(WEIGHTS), tensors, &metadata)?;
    let text = adapter_json(lora, &targets(&adapted, &plain), &exceptions, base_model);
    write_atomic(&staged.path().join(CONFIG), format!("{text:#}\n").as_bytes())?;
    staged.commit()
}

/// An adapter, and the rows of its module that it belongs to.
struct Part {
    a: TensorData,
    b: TensorData,
    rows: Option<Rows>,
}

/// One adapter that does what the parts of a fused projection do: their `a` below each other, their `b` as blocks.
fn fuse(parts: &[Part]) -> (TensorData, TensorData) {
    if let [Part { a, b, rows: None }] = parts {
        return (a.clone(), b.clone());
    }
    let inputs = parts[0].a.shape[1];
    let rank: usize = parts.iter().map(|part| part.a.shape[0]).sum();
    let out = parts.iter().find_map(|part| part.rows).map_or(0, |rows| rows.total);
    let a: Vec<f32> = parts.iter().flat_map(|part| part.a.iter::<f32>()).collect();
    let mut b = vec![0.0; out * rank];
    let mut column = 0;
    for part in parts {
        let own = part.b.shape[1];
        let values: Vec<f32> = part.b.iter().collect();
        let rows = part.rows.iter().flat_map(|rows| rows.starts().flat_map(move |start| start..start + rows.len));
        for (row, values) in rows.zip(values.chunks_exact(own)) {
            b[row * rank + column..row * rank + column + own].copy_from_slice(values);
        }
        column += own;
    }
    (TensorData::new(a, [rank, inputs]), TensorData::new(b, [out, rank]))
}

/// Last names where they say it all; whole names of modules whose namesakes are not adapted.
fn targets(adapted: &BTreeSet<String>, plain: &BTreeSet<String>) -> Vec<String> {
    let ambiguous: BTreeSet<&str> = plain.iter().map(|key| leaf(key)).collect();
    let names = adapted.iter().map(|key| if ambiguous.contains(leaf(key)) { key.as_str() } else { leaf(key) });
    names.collect::<BTreeSet<_>>().into_iter().map(String::from).collect()
}

/// `exceptions`: how many adapters were fused into that of a module.
fn adapter_json(lora: &LoraConfig, targets: &[String], exceptions: &BTreeMap<String, usize>, base_model: &str) -> Value {
    let ranks: Map<String, Value> = exceptions.iter().map(|(name, parts)| (name.clone(), (parts * lora.rank).into())).collect();
    let alphas: Map<String, Value> = exceptions.iter().map(|(name, parts)| (name.clone(), json!(*parts as f32 * lora.alpha))).collect();
    json!({
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": targets,
        "bias": "none",
        "fan_in_fan_out": false,
        "init_lora_weights": true,
        "inference_mode": true,
        "modules_to_save": null,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "use_dora": false,
        "use_rslora": false,
    })
}

/// The two matrices of each adapted module, by PEFT's name of it.
fn read_pairs(dir: &Path) -> Result<BTreeMap<String, [Option<TensorData>; 2]>> {
    let file: PathBuf = dir.join(WEIGHTS);
    let (tensors, _) = read_safetensors(&file)?;
    let mut pairs: BTreeMap<String, [Option<TensorData>; 2]> = BTreeMap::new();
    let mut problems = Vec::new();
    for (key, data) in tensors {
        let name = key.strip_prefix(PREFIX).unwrap_or(&key);
        // PEFT writes `.lora_A.weight`; in memory and in some files the adapter's name stands between.
        let found = [".lora_A.", ".lora_B."].iter().enumerate().find_map(|(i, part)| {
            let (module, rest) = name.split_once(part)?;
            matches!(rest, "weight" | "default.weight").then(|| (i, module.to_string()))
        });
        match found {
            Some((i, module)) => pairs.entry(module).or_default()[i] = Some(data),
            None => problems.push(format!("{key}: not a lora_A or lora_B of a projection")),
        }
    }
    if problems.is_empty() { Ok(pairs) } else { Err(AdapterError::Mismatch { dir: dir.to_path_buf(), problems }.into()) }
}

/// Attaches a PEFT adapter to its base model. Everything that does not fit is one error.
pub fn load_adapter<B: KernelBackend>(
    dir: &Path,
    model: Decoder<B>,
    config: &DecoderConfig,
    device: &B::Device,
) -> Result<(Decoder<B>, LoraReport, AdapterConfig)> {
    let adapter = AdapterConfig::open(dir)?
        .ok_or_else(|| AdapterError::Unsupported { file: dir.join(CONFIG), problem: "there is no such file: not an adapter".into() })?;
    let pairs = read_pairs(dir)?;
    let config = &config.in_transformers().unwrap_or_else(|_| config.clone());
    let keys = module_keys(config);
    let adapted = |path: &str| keys.get(path).is_some_and(|(key, _)| pairs.contains_key(key));
    let names: BTreeSet<String> = keys.keys().filter(|path| adapted(path)).map(|path| leaf(path).to_string()).collect();
    if names.is_empty() {
        let problems = pairs.keys().map(|key| format!("{key}: the model has no such projection")).collect();
        return Err(AdapterError::Mismatch { dir: dir.to_path_buf(), problems }.into());
    }
    let lora = LoraConfig { rank: adapter.rank, alpha: adapter.alpha, targets: LoraTargets::Names(names.into_iter().collect()) };
    let (mut model, mut report) = model.attach_lora(&lora, 0, device).map_err(AdapterError::from)?;

    let mut problems = Vec::new();
    let mut unknown: BTreeSet<String> = pairs.keys().cloned().collect();
    model.for_each_linear(&mut |path, linear| {
        let [out, inputs] = linear.dims();
        let Some(slot) = linear.lora.take() else { return };
        let drawn = slot.a.dims()[0] * (inputs + out);
        let found = keys.get(path).and_then(|(key, rows)| pairs.get(key).map(|pair| (key, rows, pair)));
        let Some((key, rows, pair)) = found else {
            // A namesake in another layer is adapted and this one is not.
            report.trainable -= drawn;
            report.total -= drawn;
            report.adapted.retain(|p| p != path);
            report.untouched.push(path.to_string());
            return;
        };
        unknown.remove(key);
        match own_part(pair, rows.as_ref(), [out, inputs]) {
            Ok([a, b]) => {
                let loaded = a.num_elements() + b.num_elements();
                report.trainable = report.trainable + loaded - drawn;
                report.total = report.total + loaded - drawn;
                let put = |data| Param::from_tensor(Tensor::from_data(data, (device, DType::F32)));
                linear.lora = Some(Lora { a: put(a), b: put(b), scale: adapter.scale(key) });
            }
            Err(problem) => problems.push(format!("{path}{problem}")),
        }
    });
    problems.extend(unknown.iter().map(|key| format!("{key}: the model has no such projection")));
    if problems.is_empty() { Ok((model, report, adapter)) } else { Err(AdapterError::Mismatch { dir: dir.to_path_buf(), problems }.into()) }
}

/// The two matrices of a projection of shape `[out, in]`, which may be some rows of the adapted module.
fn own_part(pair: &[Option<TensorData>; 2], rows: Option<&Rows>, [out, inputs]: [usize; 2]) -> Result<[TensorData; 2], String> {
    let [Some(a), Some(b)] = pair else { return Err(": one of lora_A and lora_B is missing".into()) };
    let rank = a.shape.first().copied().unwrap_or(0);
    let all = rows.map_or(out, |rows| rows.total);
    for (name, data, expected) in [("lora_A", a, [rank, inputs]), ("lora_B", b, [all, rank])] {
        if data.shape.to_vec() != expected {
            return Err(format!(".{name}: expected {expected:?}, found {:?}", data.shape.to_vec()));
        }
    }
    let (a, b) = (cast(a.clone(), DType::F32), cast(b.clone(), DType::F32));
    let Some(rows) = rows else { return Ok([a, b]) };
    let values: Vec<f32> = b.iter().collect();
    let own: Vec<f32> = rows.starts().flat_map(|start| &values[start * rank..(start + rows.len) * rank]).copied().collect();
    Ok([a, TensorData::new(own, [out, rank])])
}
