// Vercel's AI SDK with its three providers, each in its own format: text, stream, tools and back, an object.
import assert from 'node:assert/strict';
import { createAnthropic } from '@ai-sdk/anthropic';
import { createOpenAI } from '@ai-sdk/openai';
import { createOpenAICompatible } from '@ai-sdk/openai-compatible';
import { generateObject, generateText, jsonSchema, stepCountIs, streamText, tool } from 'ai';

const baseURL = process.argv[2];
const apiKey = 'none';
const openai = createOpenAI({ baseURL, apiKey });
const models = [
  createOpenAICompatible({ name: 'ottava', baseURL, apiKey, supportsStructuredOutputs: true })('fake'),
  openai.responses('fake'),
  openai.chat('fake'),
  createAnthropic({ baseURL, apiKey })('fake'),
];
const weather = tool({
  description: 'Weather of a city',
  inputSchema: jsonSchema({
    type: 'object',
    properties: { city: { type: 'string' } },
    required: ['city'],
    additionalProperties: false,
  }),
  execute: async ({ city }) => (assert.equal(city, 'Bonn'), '21 degrees'),
});
const schema = jsonSchema({
  type: 'object',
  properties: { city: { type: 'string' }, degrees: { type: 'number' } },
  required: ['city', 'degrees'],
  additionalProperties: false,
});

for (const model of models) {
  const ask = { model, maxRetries: 0 };
  const said = await generateText({ ...ask, system: 'Be brief.', prompt: 'Hi', temperature: 0, maxOutputTokens: 512 });
  assert.equal(said.text, 'Hello.');
  assert.equal(said.finishReason, 'stop');
  assert.ok(said.usage.outputTokens > 0);

  const stream = streamText({ ...ask, prompt: 'Hi' });
  let text = '';
  for await (const part of stream.textStream) text += part;
  assert.equal(text, 'Hello.');

  const steps = { ...ask, tools: { weather }, stopWhen: stepCountIs(3), prompt: 'Hi' };
  assert.equal((await generateText(steps)).text, 'It is 21 degrees in Bonn.');
  assert.equal(await streamText(steps).text, 'It is 21 degrees in Bonn.');

  const { object } = await generateObject({ ...ask, schema, prompt: 'Hi' });
  assert.deepEqual(object, { city: 'Bonn', degrees: 21 });
}
