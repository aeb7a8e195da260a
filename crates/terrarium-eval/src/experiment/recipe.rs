//! Recipes: the ones that come along, files of the user's, overrides.

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Copying, Experiment, LayerMix, LongContext, Mqar, Phonebook, Precision, Scaling, Speed, Training};
use crate::EvalError;

/// What to run. In JSON the key `experiment` says which one; unknown keys are mistakes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "experiment", rename_all = "kebab-case")]
pub enum Recipe {
    /// Associative recall with many queries.
    Mqar(Mqar),
    /// Copying strings.
    Copy(Copying),
    /// Phonebook lookup.
    Phonebook(Phonebook),
    /// How many of the layers attend.
    LayerMix(LayerMix),
    /// Loss against compute.
    Scaling(Scaling),
    /// bfloat16 against float32.
    Precision(Precision),
    /// Short models continued at longer lengths.
    LongContext(LongContext),
    /// Times of operations and whole models.
    Speed(Speed),
}

/// Name, recipe and small recipe of an experiment that comes along.
macro_rules! recipe {
    ($name:literal) => {
        (
            $name,
            include_str!(concat!("../../../../examples/experiments/", $name, ".json")),
            include_str!(concat!("../../../../examples/experiments/smoke/", $name, ".json")),
        )
    };
}

const RECIPES: [(&str, &str, &str); 8] = [
    recipe!("mqar"),
    recipe!("copy"),
    recipe!("phonebook"),
    recipe!("layer-mix"),
    recipe!("scaling"),
    recipe!("precision"),
    recipe!("long-context"),
    recipe!("speed"),
];

/// Experiments that come along.
pub fn recipe_names() -> Vec<&'static str> {
    RECIPES.iter().map(|(name, ..)| *name).collect()
}

impl Recipe {
    /// The recipe of a name, or of a JSON file, with some keys replaced (`training.steps=100`, `models.architectures.0.state=32`).
    ///
    /// # Errors
    /// [`EvalError`] names the key.
    pub fn open(name: &str, smoke: bool, overrides: &[String]) -> Result<Self, EvalError> {
        let path = Path::new(name);
        let text = match RECIPES.iter().find(|(known, ..)| *known == name) {
            Some((_, full, small)) => (if smoke { small } else { full }).to_string(),
            None if !path.is_file() => {
                return Err(EvalError::UnknownExperiment { name: name.to_string(), known: recipe_names().join(", ") });
            }
            None if smoke => return Err(EvalError::NoSmoke { path: path.to_path_buf() }),
            None => std::fs::read_to_string(path).map_err(EvalError::io("read", path))?,
        };
        let wrong = |error: serde_json::Error| EvalError::Recipe { name: name.to_string(), reason: error.to_string() };
        let mut value: Value = serde_json::from_str(&text).map_err(wrong)?;
        // What the file leaves out can be set too.
        let filled: Self = Self::deserialize(&value).map_err(wrong)?;
        if let Ok(all) = serde_json::to_value(&filled) {
            value = all;
        }
        for assignment in overrides {
            assign(&mut value, assignment)?;
        }
        Self::deserialize(&value).map_err(wrong)
    }

    /// Refuses values that make no sense.
    ///
    /// # Errors
    /// [`EvalError::Value`] names the key.
    pub fn check(&self) -> Result<(), EvalError> {
        match self {
            Self::Mqar(experiment) => complete(experiment),
            Self::Copy(experiment) => complete(experiment),
            Self::Phonebook(experiment) => complete(experiment),
            Self::LayerMix(experiment) => complete(experiment),
            Self::Scaling(experiment) => complete(experiment),
            Self::Precision(experiment) => complete(experiment),
            Self::LongContext(experiment) => complete(experiment),
            Self::Speed(experiment) => complete(experiment),
        }
    }

    /// As JSON, every default filled in.
    pub fn to_json(&self) -> Value {
        serde_json::to_value(self).unwrap_or_default()
    }

    /// Name of the experiment.
    pub fn name(&self) -> String {
        self.to_json().get("experiment").and_then(Value::as_str).unwrap_or_default().to_string()
    }
}

fn complete(experiment: &impl Experiment) -> Result<(), EvalError> {
    experiment.check()?;
    experiment.training().map_or(Ok(()), Training::check)?;
    experiment.cells().map(drop)
}

/// Puts `a.b=value` or `a.0.b=value` in place. The value is JSON, or else a string.
fn assign(root: &mut Value, assignment: &str) -> Result<(), EvalError> {
    let fail = |reason: String| EvalError::Override { assignment: assignment.to_string(), reason };
    let (key, value) = assignment.split_once('=').ok_or_else(|| fail("expected KEY=VALUE, as in training.steps=100".to_string()))?;
    let value = serde_json::from_str(value.trim()).unwrap_or_else(|_| Value::String(value.trim().to_string()));
    let mut place = root;
    for part in key.trim().split('.') {
        let keys: Vec<&str> = place.as_object().into_iter().flat_map(|map| map.keys()).map(String::as_str).collect();
        let unknown = match keys.as_slice() {
            [] => format!("there is no `{part}` there"),
            keys => format!("there is no `{part}`; keys here: {}", keys.join(", ")),
        };
        let inner = match place {
            Value::Object(map) => map.get_mut(part),
            Value::Array(items) => part.parse().ok().and_then(|at: usize| items.get_mut(at)),
            _ => None,
        };
        place = inner.ok_or_else(|| fail(unknown))?;
    }
    if key.trim() == "experiment" {
        return Err(fail("give the name of the other experiment instead".to_string()));
    }
    *place = value;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn recipes_that_come_along_are_complete() {
        for name in recipe_names() {
            for smoke in [false, true] {
                let recipe = Recipe::open(name, smoke, &[]).unwrap_or_else(|error| panic!("{name}: {error}"));
                assert_eq!(recipe.name(), name);
                recipe.check().unwrap_or_else(|error| panic!("{name}: {error}"));
            }
        }
    }

    #[test]
    fn every_file_of_the_examples_is_a_recipe() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/experiments");
        let files = [folder.clone(), folder.join("smoke")].into_iter().flat_map(|folder| std::fs::read_dir(folder).unwrap());
        let files: Vec<_> = files.map(|entry| entry.unwrap().path()).filter(|path| path.extension().is_some_and(|e| e == "json")).collect();
        assert!(files.len() > 2 * RECIPES.len());
        for path in files {
            Recipe::open(path.to_str().unwrap(), false, &[]).and_then(|recipe| recipe.check()).unwrap_or_else(|error| panic!("{error}"));
        }
    }

    #[test]
    fn overrides_reach_into_lists_and_mistakes_are_named() {
        let said = |name: &str, set: &[&str]| {
            let set: Vec<String> = set.iter().map(ToString::to_string).collect();
            Recipe::open(name, true, &set).map(|recipe| recipe.to_json()).map_err(|error| error.to_string())
        };
        let json = said("mqar", &["training.steps=7", "models.architectures.0.name=other", "models.seeds=[5]"]).unwrap();
        assert_eq!((json["training"]["steps"].as_u64(), json["models"]["architectures"][0]["name"].as_str()), (Some(7), Some("other")));
        assert!(said("mqar", &["training.step=7"]).unwrap_err().contains("no `step`"));
        assert!(said("mqar", &["training.steps"]).unwrap_err().contains("KEY=VALUE"));
        assert!(said("mqar", &["training.steps=many"]).unwrap_err().contains("many"));
        assert!(said("mqar", &["experiment=copy"]).is_err());
        let unknown = said("absent", &[]).unwrap_err();
        assert!(unknown.contains("mqar"), "{unknown}");
    }

    #[test]
    fn files_are_read_strictly() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("mine.json");
        let name = path.to_str().unwrap();
        let text =
            std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/experiments/smoke/mqar.json")).unwrap();
        std::fs::write(&path, &text).unwrap();
        assert_eq!(Recipe::open(name, false, &[]).unwrap(), Recipe::open("mqar", true, &[]).unwrap());
        assert!(Recipe::open(name, true, &[]).unwrap_err().to_string().contains("--smoke"));
        std::fs::write(&path, text.replacen("\"seeds\"", "\"sedes\"", 1)).unwrap();
        assert!(Recipe::open(name, false, &[]).unwrap_err().to_string().contains("sedes"));
    }

    #[test]
    fn recipes_without_operations_and_models_speak_of_generation_alone() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/experiments/speed-8b.json");
        let Recipe::Speed(speed) = Recipe::open(path.to_str().unwrap(), false, &[]).unwrap() else { panic!("another experiment") };
        let cells = speed.cells().unwrap();
        assert_eq!(cells.len(), 24);
        let report = speed.report(&[]);
        assert!(report.verdict.checks.iter().all(|check| check.claim.contains("decodes") || check.claim.contains("lead")));
        assert!(report.figure.panels.is_empty() && report.notes.len() == 1, "{:?}", report.notes);
    }
}
