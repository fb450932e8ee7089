//! What a request asks about: texts, token ids or a conversation, as prompts of sessions.

use serde::{Deserialize, Serialize};
use specattn_proto::Fault;
use specattn_proto::v1::TokenIds;
use specattn_proto::v1::generate_request;

use super::chat_template::ChatTemplate;
use super::error::ApiError;
use crate::tokenizer::Tokenizer;

/// The `prompt` field of a completion: OpenAI takes four shapes.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub(super) enum Prompts {
    Text(String),
    Tokens(Vec<u32>),
    Texts(Vec<String>),
    TokenLists(Vec<Vec<u32>>),
}

/// One prompt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Prompt {
    Text(String),
    Tokens(Vec<u32>),
}

impl Prompts {
    pub(super) fn list(self) -> Vec<Prompt> {
        match self {
            Self::Text(text) => vec![Prompt::Text(text)],
            Self::Tokens(ids) => vec![Prompt::Tokens(ids)],
            Self::Texts(texts) => texts.into_iter().map(Prompt::Text).collect(),
            Self::TokenLists(lists) => lists.into_iter().map(Prompt::Tokens).collect(),
        }
    }
}

impl Prompt {
    pub(super) fn to_proto(&self) -> generate_request::Prompt {
        match self {
            Self::Text(text) => generate_request::Prompt::Text(text.clone()),
            Self::Tokens(ids) => generate_request::Prompt::TokenIds(TokenIds { ids: ids.clone() }),
        }
    }

    /// Its text.
    pub(super) fn text(&self, tokenizer: &Tokenizer) -> Result<String, Fault> {
        match self {
            Self::Text(text) => Ok(text.clone()),
            Self::Tokens(ids) => tokenizer.decode(ids),
        }
    }
}

/// One turn of a conversation.
#[derive(Debug, Deserialize, Serialize)]
pub(super) struct Message {
    role: String,
    #[serde(default)]
    content: Content,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    name: Option<String>,
}

/// A turn's text, whole or in parts.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Content {
    Text(String),
    Parts(Vec<Part>),
    None(()),
}

#[derive(Debug, Deserialize)]
struct Part {
    #[serde(rename = "type")]
    kind: String,
    text: Option<String>,
}

impl Default for Content {
    fn default() -> Self {
        Self::None(())
    }
}

/// Templates see text, in whatever parts it came.
impl Serialize for Content {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Text(text) => serializer.serialize_str(text),
            Self::Parts(parts) => {
                let texts: Vec<&str> = parts
                    .iter()
                    .filter_map(|part| part.text.as_deref())
                    .collect();
                serializer.serialize_str(&texts.join("\n"))
            }
            Self::None(()) => serializer.serialize_str(""),
        }
    }
}

/// The prompt of a conversation: the template writes the model's special tokens itself, so the tokenizer adds none. Takes
/// a while for long conversations: call where blocking is allowed.
pub(super) fn of_conversation(
    messages: &[Message],
    template: &ChatTemplate,
    tokenizer: &Tokenizer,
) -> Result<Prompt, ApiError> {
    for message in messages {
        let Content::Parts(parts) = &message.content else {
            continue;
        };
        if let Some(part) = parts.iter().find(|part| part.kind != "text") {
            let reason = format!("parts of type {:?} are not supported, only text", part.kind);
            return Err(ApiError::invalid("messages", reason));
        }
    }
    let text = template
        .render(messages)
        .map_err(|reason| ApiError::invalid("messages", reason))?;
    Ok(Prompt::Tokens(tokenizer.encode_rendered(&text)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn four_shapes_of_prompts() {
        let list = |value| serde_json::from_value::<Prompts>(value).unwrap().list();
        assert_eq!(list(json!("a")), [Prompt::Text("a".to_owned())]);
        assert_eq!(list(json!([1, 2])), [Prompt::Tokens(vec![1, 2])]);
        assert_eq!(list(json!(["a", "b"])).len(), 2);
        assert_eq!(list(json!([[1], [2, 3]]))[1], Prompt::Tokens(vec![2, 3]));
        assert!(serde_json::from_value::<Prompts>(json!({"a": 1})).is_err());
    }

    #[test]
    fn parts_become_one_text() {
        let message: Message = serde_json::from_value(json!({
            "role": "user",
            "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
        }))
        .unwrap();
        assert_eq!(
            serde_json::to_value(&message).unwrap(),
            json!({"role": "user", "content": "a\nb"})
        );
    }
}
