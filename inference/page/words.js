// The words of the page. English ones stand where they are used; here are their Chinese counterparts.
const CHINESE = {
  "Settings": "设置", "New chat": "新对话", "Model": "模型", "Beside it": "并排比较", "nothing": "无",
  "(base model)": "（基座模型）", "a mix of adapters": "混合适配器", "Weights of the mix": "混合权重",
  "Temperature": "温度", "Longest answer, in tokens": "回答的最大词元数", "System message": "系统消息",
  "Tools, as JSON": "工具（JSON）", "The tools are not valid JSON: {why}": "工具不是有效的 JSON：{why}",
  "Thinking first": "先思考", "as it likes": "由模型决定", "on": "开", "off": "关",
  "Look inside": "看看内部", "Probabilities": "概率", "sure": "确定", "unsure": "不确定",
  "Key of this server (its --api_key)": "此服务器的密钥（其 --api_key）",
  "What would you like to ask?": "想问点什么？", "Who are you?": "你是谁？",
  "A small model knows the small world that it was trained on. Questions that suit it:":
    "小模型只了解它训练时见过的小世界。适合它的问题：",
  "What sound does a frog make?": "猫怎么叫？", "Tell me a short story about a fox in the forest.": "讲一个关于猫在磨坊里的故事。",
  "Your message": "你的消息", "Ask something": "请输入消息", "Send": "发送", "Stop": "停止",
  "A base model knows no conversation. It continues your text.": "基座模型不懂对话，只会续写你的文字。",
  "You asked": "你的提问", "Thinking": "思考过程", "Call of the tool {name}": "调用工具 {name}",
  "Edit": "编辑", "Cancel": "取消", "Copy": "复制", "Copied": "已复制", "Again": "重新生成", "Continue": "继续",
  "The browser does not allow copying here.": "浏览器不允许在这里复制。",
  "writing": "正在生成", "stopped": "已停止", "cut off": "因长度中断", "no words": "没有文字",
  "{n} tokens": "{n} 个词元", "{n} tokens/s": "{n} 词元/秒",
  "Tokens with their probabilities. The arrow keys go to the next one, Enter opens the others.":
    "词元及其概率。用方向键移动，按回车打开其他候选。",
  "Choose another token, and the answer goes on from there.": "选择另一个词元，回答会从那里继续。",
  "probability unknown": "概率未知", "written": "已写", "half a character": "半个字符",
  "Tokens and loss mask": "词元与损失掩码", "The conversation as training would see it": "训练所见的对话",
  "{n} of {most} tokens. The model learns to write the {trained} underlined ones. It only reads the others.":
    "共 {n} 个词元（上限 {most}）。模型学习写出带下划线的 {trained} 个，其余的只被读取。",
  "trained": "参与训练", "There is no conversation yet.": "还没有对话。", "Close": "关闭",
  "This server asks for a key. Please enter it in the settings.": "此服务器需要密钥。请在设置中输入。",
  "The server does not answer. Is it still running?": "服务器没有响应。它还在运行吗？",
  "The server answered with the status {status}.": "服务器返回状态 {status}。",
  "The server broke the answer off.": "服务器中断了回答。",
};
const isChinese = navigator.language.toLowerCase().startsWith("zh");

// The text in the reader's language, with {name} replaced by values.name.
export function t(english, values = {}) {
  const text = isChinese ? CHINESE[english] ?? english : english;
  return text.replace(/\{(\w+)\}/g, (_, name) => values[name]);
}

// Translates what index.html holds.
export function translatePage() {
  document.documentElement.lang = isChinese ? "zh" : "en";
  for (const element of document.querySelectorAll("[data-t]")) {
    const attributes = ["aria-label", "placeholder"].filter((name) => element.hasAttribute(name));
    for (const name of attributes) element.setAttribute(name, t(element.getAttribute(name)));
    if (!attributes.length) element.textContent = t(element.textContent);
  }
}
